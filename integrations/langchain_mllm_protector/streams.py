"""Streams through the guard: judged and sent on while they come in, if they are text whose question is known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, BaseRunManager, CallbackManagerForChainRun
from langchain_core.messages import AIMessageChunk
from langchain_core.runnables import RunnableConfig

from langchain_mllm_protector.capture import find_question_early
from langchain_mllm_protector.cases import Case, MissingQuestion, ToolCalls, calls_go, explicit_question, origin_of
from langchain_mllm_protector.chunks import ChunkAnswer, TextAnswer, only_text
from langchain_mllm_protector.judging import check_calls
from langchain_mllm_protector.leaves import pieces
from langchain_mllm_protector.messages import Question, answer_text, merge_stream
from langchain_mllm_protector.owned import Owned
from langchain_mllm_protector.tracing import areport, report
from mllm_protector_guard import Guard, GuardError, GuardRecord, GuardResult, Origin, Turn

__all__ = ["StreamOpener", "aguard_stream", "arelay", "guard_stream", "relay"]

logger = logging.getLogger(__name__)

Output = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOpener:
    """Starts the checks of the streams of one run, if they can be judged before they end.

    Attributes:
        engine: Gives the guard that decides.
        mode: "whole", "sentence", or the number of tokens after which the answer is judged.
        on_missing_question: As in `ProtectorGuard`.
        capture: Whether questions are looked for in the prompts of model calls.
        tool_calls: As in `ProtectorGuard`.
        context_turns: As in `ProtectorGuard`.
        config: The configuration of the run.
        run_manager: Manages the run.
    """

    engine: Callable[[], Guard]
    mode: Literal["sentence", "whole"] | int
    on_missing_question: MissingQuestion
    capture: bool
    tool_calls: ToolCalls
    context_turns: int
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
        found = explicit_question(None, self.config, context_turns=self.context_turns)
        if found is None and self.capture:
            found = find_question_early(self.run_manager.run_id, begun[-1], context_turns=self.context_turns)
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
            self.engine(),
            begun,
            question=question,
            origin=origin_of(match, self.run_manager),
            mode=mode,
            tool_calls=self.tool_calls,
        )


class StreamedCheck:
    """The check of one streamed answer.

    Args:
        guard: Decides.
        begun: The parts that came so far, at least one.
        question: What was asked; None when unknown.
        origin: Where the answer comes from, for the record.
        mode: As in `StreamPolicy`.
        tool_calls: As in `ProtectorGuard`.
    """

    def __init__(
        self,
        guard: Guard,
        begun: list[Any],
        *,
        question: Question | None,
        origin: Origin,
        mode: str,
        tool_calls: ToolCalls,
    ) -> None:
        self._guard = guard
        self._of_text = guard.changed(sinks=[self])  # the record may have to wait for the tool calls
        self._record: GuardRecord | None = None
        self._settled = False
        self._answer = TextAnswer() if isinstance(begun[0], str) else ChunkAnswer()
        self._read = ["".join([self._answer.take(part) for part in begun])]
        self._tool_calls = tool_calls
        self._asked: dict[str, Any] = {
            "question": None if question is None else question.text,
            "images": () if question is None else question.images,
        }
        self._how: dict[str, Any] = {"mode": mode, "origin": origin}
        self._origin = origin

    def emit(self, record: GuardRecord) -> None:
        """Keeps the one record of the text."""
        self._record = record

    def run(self, parts: Iterator[Any], run_manager: CallbackManagerForChainRun) -> Generator[Output]:
        """What leaves of the answer, of which `parts` are to come; the record is reported before the last chunk."""
        stream = self._of_text.stream(self._pieces(parts), **self._asked, **self._how)
        try:
            for text in stream:
                yield from self._answer.leave(text, replaced=stream.replaced)
            for part in parts:  # not read after a refusal, but LangChain reads them all, and usage comes last
                self._answer.take(part)
            last = self._settle(stream.result)
        finally:
            stream.close()
            record = self._ended()
            if record is not None:
                report(record, run_manager)
        yield from last

    async def arun(
        self, parts: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun
    ) -> AsyncGenerator[Output]:
        """`run` with the models in worker threads."""
        stream = self._of_text.astream(self._apieces(parts), **self._asked, **self._how)
        try:
            async for text in stream:
                for chunk in self._answer.leave(text, replaced=stream.replaced):
                    yield chunk
            async for part in parts:
                self._answer.take(part)
            last = await self._guard.in_thread(partial(self._settle, stream.result))
        finally:
            await stream.aclose()
            record = self._ended()
            if record is not None:
                await areport(record, run_manager)
        for chunk in last:
            yield chunk

    def _settle(self, text: GuardResult) -> list[Output]:
        """The last chunks, now that the tool calls are judged too; the record goes to the sinks.

        Raises:
            HarmfulAnswerError: A tool call is harmful and the policy says `on_harm="raise"`.
            InferenceError: A tool call could not be judged and the policy says `on_error="raise"`.
        """
        self._settled = True
        verdict: GuardResult | GuardError = text
        values = pieces(self._answer.calls()) if self._tool_calls == "judge" else ()
        try:
            if values:
                turn = Turn(answer="".join(self._read), **self._asked)
                case = Case(answer=None, turn=turn, pieces=values, origin=self._origin)
                verdict, self._record = check_calls(self._guard, case, text)
        finally:
            assert self._record is not None  # a text that was read to its end is on record
            self._guard.emit(self._record)
        if isinstance(verdict, GuardError):
            raise verdict
        return self._answer.last(verdict, self._record, with_calls=not (values and calls_go(verdict)))

    def _ended(self) -> GuardRecord | None:
        """The record, which the sinks have got now, however the stream ended."""
        if self._record is not None and not self._settled:
            self._guard.emit(self._record)
        return self._record

    def _pieces(self, parts: Iterator[Any]) -> Generator[str]:
        yield self._read[0]
        for part in parts:
            yield self._heard(self._answer.take(part))
        yield self._heard(self._answer.end())

    async def _apieces(self, parts: AsyncIterator[Any]) -> AsyncGenerator[str]:
        yield self._read[0]
        async for part in parts:
            yield self._heard(self._answer.take(part))
        yield self._heard(self._answer.end())

    def _heard(self, text: str) -> str:
        self._read.append(text)
        return text


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
            async with aclosing(Owned(check.arun(parts, run_manager))) as chunks:
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
    if not isinstance(parts, AsyncGenerator):
        async for part in parts:
            yield part
        return
    async with aclosing(Owned(parts)) as owned:
        async for part in owned:
            yield part
