"""Streams through the guard: judged and sent on while they come in, if they are text whose question is known."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, BaseRunManager, CallbackManagerForChainRun
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import RunnableConfig

from langchain_mllm_protector.capture import find_question_early
from langchain_mllm_protector.cases import MissingQuestion, explicit_question, origin_of
from langchain_mllm_protector.chunks import ChunkAnswer, TextAnswer, only_text
from langchain_mllm_protector.messages import Question, answer_text, merge_stream
from langchain_mllm_protector.tracing import areport, report
from mllm_protector_guard import Guard, GuardRecord, Origin

__all__ = ["StreamOpener", "aguard_stream", "arelay", "guard_stream", "relay"]

logger = logging.getLogger(__name__)

Output = AIMessage | str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOpener:
    """Starts the checks of the streams of one run, if they can be judged before they end.

    Attributes:
        engine: Gives the guard that decides.
        mode: "whole", "sentence", or the number of tokens after which the answer is judged.
        on_missing_question: As in `ProtectorGuard`.
        capture: Whether questions are looked for in the prompts of model calls.
        config: The configuration of the run.
        run_manager: Manages the run.
    """

    engine: Callable[[], Guard]
    mode: Literal["sentence", "whole"] | int
    on_missing_question: MissingQuestion
    capture: bool
    config: RunnableConfig
    run_manager: BaseRunManager

    def takes(self, part: object) -> bool:
        """Whether a stream that begins with such parts may leave before its end."""
        return self.mode != "whole" and (
            isinstance(part, str) or (isinstance(part, AIMessageChunk) and only_text(part.content))
        )

    def open(self, begun: list[Any]) -> StreamedCheck | None:
        """The check of the answer that begins with these parts; None if its question is not known before its end.

        Raises:
            TypeError: The parts are not of one kind, or the question is of no known kind.
        """
        found = explicit_question(None, self.config)
        if found is None and self.capture:
            found = find_question_early(self.run_manager.run_id, begun[-1])
            if found[0] is None:
                return None
        question, match = found or (None, "none")
        if question is None:
            if self.on_missing_question in ("withhold", "raise"):
                return None  # decided as for any whole answer
            if self.on_missing_question == "warn":
                logger.warning("a stream is judged without its question: not found")
        mode = f"tokens={self.mode}" if isinstance(self.mode, int) else self.mode
        return StreamedCheck(
            self.engine(), begun, question=question, origin=origin_of(match, self.run_manager), mode=mode
        )


class StreamedCheck:
    """The check of one streamed answer.

    Args:
        guard: Decides.
        begun: The parts that came so far, at least one.
        question: What was asked; None when unknown.
        origin: Where the answer comes from, for the record.
        mode: As in `StreamPolicy`.
    """

    def __init__(self, guard: Guard, begun: list[Any], *, question: Question | None, origin: Origin, mode: str) -> None:
        self._record = _KeptRecord()
        self._guard = copy.copy(guard)
        self._guard.sinks = (*guard.sinks, self._record)
        self._answer = TextAnswer() if isinstance(begun[0], str) else ChunkAnswer()
        self._begun = "".join([self._answer.take(part) for part in begun])
        self._asked: dict[str, Any] = {
            "question": None if question is None else question.text,
            "images": () if question is None else question.images,
            "mode": mode,
            "origin": origin,
        }

    def run(self, parts: Iterator[Any], run_manager: CallbackManagerForChainRun) -> Generator[Output]:
        """What leaves of the answer, of which `parts` are to come; the record is reported before the last chunk."""
        stream = self._guard.stream(self._pieces(parts), **self._asked)
        try:
            for text in stream:
                yield from self._answer.leave(text, replaced=stream.replaced)
            for part in parts:  # not read after a refusal, but LangChain reads them all, and usage comes last
                self._answer.take(part)
        finally:
            stream.close()
            if self._record.value is not None:
                report(self._record.value, run_manager)
        yield from self._answer.last(stream.result, self._record.of_end())

    async def arun(
        self, parts: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun
    ) -> AsyncGenerator[Output]:
        """`run` with the models in worker threads."""
        stream = self._guard.astream(self._apieces(parts), **self._asked)
        try:
            async for text in stream:
                for chunk in self._answer.leave(text, replaced=stream.replaced):
                    yield chunk
            async for part in parts:
                self._answer.take(part)
        finally:
            await stream.aclose()
            if self._record.value is not None:
                await areport(self._record.value, run_manager)
        for chunk in self._answer.last(stream.result, self._record.of_end()):
            yield chunk

    def _pieces(self, parts: Iterator[Any]) -> Generator[str]:
        yield self._begun
        for part in parts:
            yield self._answer.take(part)
        yield self._answer.end()

    async def _apieces(self, parts: AsyncIterator[Any]) -> AsyncGenerator[str]:
        yield self._begun
        async for part in parts:
            yield self._answer.take(part)
        yield self._answer.end()


class _KeptRecord:
    """A sink that keeps the one record of a stream."""

    def __init__(self) -> None:
        self.value: GuardRecord | None = None

    def emit(self, record: GuardRecord) -> None:
        self.value = record

    def of_end(self) -> GuardRecord:
        assert self.value is not None  # a stream that was read to its end is on record
        return self.value


def guard_stream(
    parts: Iterator[Any],
    opener: StreamOpener,
    run_manager: CallbackManagerForChainRun,
    *,
    guard_one: Callable[[Any], Output],
) -> Generator[Output]:
    """What may leave of a stream; `guard_one` guards it as a whole where it cannot be judged before its end."""
    begun: list[Any] = []
    for part in parts:
        begun.append(part)
        if not opener.takes(part):
            break
        if answer_text(part):
            check = opener.open(begun)
            if check is None:
                break
            yield from check.run(parts, run_manager)
            return
    begun += parts
    if begun:
        yield guard_one(merge_stream(begun))


async def aguard_stream(
    parts: AsyncIterator[Any],
    opener: StreamOpener,
    run_manager: AsyncCallbackManagerForChainRun,
    *,
    guard_one: Callable[[Any], Awaitable[Output]],
) -> AsyncGenerator[Output]:
    """`guard_stream` with the models in worker threads."""
    begun: list[Any] = []
    async for part in parts:
        begun.append(part)
        if not opener.takes(part):
            break
        if answer_text(part):
            check = await asyncio.to_thread(opener.open, begun)
            if check is None:
                break
            async with aclosing(check.arun(parts, run_manager)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
    begun += [part async for part in parts]
    if begun:
        yield await guard_one(merge_stream(begun))


# LangChain reads the rest of a stream, for its traces, after the reader has left. A closed relay has no rest.
def relay(parts: Iterator[Any]) -> Generator[Any]:
    """`parts`, closed with the relay."""
    yield from parts


async def arelay(parts: AsyncIterator[Any]) -> AsyncGenerator[Any]:
    """`parts`, closed with the relay."""
    try:
        async for part in parts:
            yield part
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()
