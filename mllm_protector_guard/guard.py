"""The guard: score, rewrite, score again, and let only a harmless text leave."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, overload

from mllm_protector_guard import calls
from mllm_protector_guard.calls import has_method, name_of, probability
from mllm_protector_guard.errors import ConfigError, GuardError
from mllm_protector_guard.guarded_stream import AsyncGuardedStream, GuardedStream
from mllm_protector_guard.patience import in_thread
from mllm_protector_guard.policy import GuardPolicy
from mllm_protector_guard.ports import Detoxifier, HarmDetector, RecordSink
from mllm_protector_guard.stream_check import StreamCheck
from mllm_protector_guard.streaming import StreamPolicy
from mllm_protector_guard.timelimit import TimeLimit
from mllm_protector_guard.tracing.record import GuardRecord
from mllm_protector_guard.types import GuardResult, ImageInput, Origin, Turn
from mllm_protector_guard.verdicts import Case, Verdict, decide, detoxify, ms_since

__all__ = ["Guard"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Guard:
    """Checks answers and returns what may leave.

    Args:
        detector: Scores answers and rewrites.
        detoxifier: Rewrites harmful answers; needed for `on_harm="detoxify"`.
        policy: What to do with a score; `GuardPolicy()` when None.
        sinks: Take a record of every check.
        trace_content: Whether records hold the texts themselves and not only their hashes.

    Raises:
        ConfigError: There is no detector, or the policy asks for rewrites and there is no detoxifier.

    Example:
        >>> from mllm_protector_guard import Guard, Turn
        >>> from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier
        >>> guard = Guard(detector=KeywordDetector({"bomb"}), detoxifier=ScriptedDetoxifier(["Let us garden."]))
        >>> guard.check(Turn(question="How?", answer="Build a bomb.")).text
        'Let us garden.'
    """

    def __init__(
        self,
        *,
        detector: HarmDetector,
        detoxifier: Detoxifier | None = None,
        policy: GuardPolicy | None = None,
        sinks: Sequence[RecordSink] = (),
        trace_content: bool = False,
    ) -> None:
        self.detector = detector
        self.detoxifier = detoxifier
        self.policy = policy or GuardPolicy()
        self.sinks = tuple(sinks)
        self.trace_content = trace_content
        if not has_method(detector, "score"):
            raise ConfigError(f"a guard needs a detector with a score() method, got {name_of(detector)}")
        if self.policy.on_harm == "detoxify" and not has_method(detoxifier, "rewrite"):
            raise ConfigError(
                f"on_harm='detoxify' needs a detoxifier with a rewrite() method, got {name_of(detoxifier)}. "
                "Give detoxifier=, or set on_harm to 'withhold', 'flag' or 'raise'."
            )

    @property
    def threshold(self) -> float:
        """Scores at or above it are harmful: the policy's, else the detector's own, else 0.5.

        Raises:
            ConfigError: The detector's own threshold is no number in [0, 1].
        """
        own = self.policy.threshold
        if own is None:
            own = getattr(self.detector, "threshold", None)
        if own is None:
            return 0.5
        threshold = probability(own)
        if threshold is None:
            raise ConfigError(f"{name_of(self.detector)}.threshold is no number in [0, 1]; set GuardPolicy.threshold")
        return threshold

    def warm_up(self) -> None:
        """Loads both models now instead of at the first check.

        Raises:
            CheckpointError: A model cannot be loaded.
        """
        calls.warm_up(self.detector)
        if self.policy.on_harm == "detoxify":
            calls.warm_up(self.detoxifier)

    def changed(self, *, sinks: Sequence[RecordSink] | None = None, **policy: Any) -> Guard:
        """A guard with the same models, other sinks if they are given, and the same policy but for these fields.

        Raises:
            ConfigError: The new policy asks for rewrites and there is no detoxifier.
            pydantic.ValidationError: The policy has no such field, or the value is out of its range.
        """
        return Guard(
            detector=self.detector,
            detoxifier=self.detoxifier,
            policy=GuardPolicy(**self.policy.model_dump() | policy) if policy else self.policy,
            sinks=self.sinks if sinks is None else sinks,
            trace_content=self.trace_content,
        )

    def check(self, turn: Turn, *, origin: Origin | None = None) -> GuardResult:
        """The verdict on one turn.

        Raises:
            HarmfulAnswerError: The answer is harmful and the policy says `on_harm="raise"`.
            InferenceError: A model failed and the policy says `on_error="raise"`.
            CheckpointError: A model cannot be loaded.
        """
        return self.check_batch([turn], origins=None if origin is None else [origin])[0]

    @overload
    def check_batch(
        self,
        turns: Sequence[Turn],
        *,
        origins: Sequence[Origin] | None = None,
        return_exceptions: Literal[False] = False,
    ) -> list[GuardResult]: ...
    @overload
    def check_batch(
        self, turns: Sequence[Turn], *, origins: Sequence[Origin] | None = None, return_exceptions: Literal[True]
    ) -> list[GuardResult | GuardError]: ...
    def check_batch(
        self,
        turns: Sequence[Turn],
        *,
        origins: Sequence[Origin] | None = None,
        return_exceptions: bool = False,
    ) -> list[GuardResult] | list[GuardResult | GuardError]:
        """The verdicts on many turns, same order, with one detector batch and one detoxifier batch an attempt.

        Args:
            turns: Any number of turns, none included.
            origins: Where each came from, for the records; one a turn.
            return_exceptions: Return `HarmfulAnswerError` and `InferenceError` in their places
                instead of raising the first.

        Raises:
            HarmfulAnswerError: An answer is harmful and the policy says `on_harm="raise"`.
            InferenceError: A model failed and the policy says `on_error="raise"`.
            CheckpointError: A model cannot be loaded.
        """
        if origins is not None and len(origins) != len(turns):
            raise ValueError(f"{len(turns)} turns came with {len(origins)} origins; give one origin a turn")
        if not turns:
            return []
        verdicts = self._judge(list(turns))
        for turn, verdict, origin in zip(turns, verdicts, origins or [Origin()] * len(turns), strict=True):
            self._emit(turn, verdict.result, origin)
        if return_exceptions:
            return [verdict.error or verdict.result for verdict in verdicts]
        for verdict in verdicts:
            if verdict.error is not None:
                raise verdict.error
        return [verdict.result for verdict in verdicts]

    async def acheck(self, turn: Turn, *, origin: Origin | None = None) -> GuardResult:
        """`check` in a worker thread; the event loop stays free."""
        return await self.in_thread(partial(self.check, turn, origin=origin))

    @overload
    async def acheck_batch(
        self,
        turns: Sequence[Turn],
        *,
        origins: Sequence[Origin] | None = None,
        return_exceptions: Literal[False] = False,
    ) -> list[GuardResult]: ...
    @overload
    async def acheck_batch(
        self, turns: Sequence[Turn], *, origins: Sequence[Origin] | None = None, return_exceptions: Literal[True]
    ) -> list[GuardResult | GuardError]: ...
    async def acheck_batch(
        self,
        turns: Sequence[Turn],
        *,
        origins: Sequence[Origin] | None = None,
        return_exceptions: bool = False,
    ) -> list[GuardResult] | list[GuardResult | GuardError]:
        """`check_batch` in a worker thread; the event loop stays free."""
        if return_exceptions:
            return await self.in_thread(partial(self.check_batch, turns, origins=origins, return_exceptions=True))
        return await self.in_thread(partial(self.check_batch, turns, origins=origins))

    async def in_thread(self, call: Callable[[], T]) -> T:
        """The value of `call()` from a worker thread: one of the detector's `executor` if it has any, else of asyncio.

        Raises:
            ConfigError: The detector was closed.
        """
        return await in_thread(getattr(self.detector, "executor", None), call)

    def stream(
        self,
        pieces: Iterable[str],
        *,
        question: str | None = None,
        images: Sequence[ImageInput] = (),
        mode: str | StreamPolicy = "sentence",
        origin: Origin | None = None,
    ) -> GuardedStream:
        """The answer while it is written: what of it is judged harmless leaves, and `result` is there at the end.

        Args:
            pieces: The answer in pieces of any size, as a model writes it. A generator is closed at the end.
            question: What was asked; None when unknown.
            images: The images of the question, in order.
            mode: `sentence`, `whole` or `tokens=N`, as in `StreamPolicy`; or a policy of your own.
            origin: Where the answer came from, for the record.

        Raises:
            pydantic.ValidationError: There is no such mode.
        """
        return GuardedStream(self._stream_check(question, images, mode, origin), pieces)

    def astream(
        self,
        pieces: AsyncIterable[str],
        *,
        question: str | None = None,
        images: Sequence[ImageInput] = (),
        mode: str | StreamPolicy = "sentence",
        origin: Origin | None = None,
    ) -> AsyncGuardedStream:
        """`stream` with the models in worker threads; the event loop stays free."""
        return AsyncGuardedStream(self._stream_check(question, images, mode, origin), pieces, self.in_thread)

    def _stream_check(
        self, question: str | None, images: Sequence[ImageInput], mode: str | StreamPolicy, origin: Origin | None
    ) -> StreamCheck:
        origin = origin or Origin()
        return StreamCheck(
            question=question,
            images=images,
            detector=self.detector,
            detoxifier=self.detoxifier,
            policy=self.policy,
            stream_policy=mode if isinstance(mode, StreamPolicy) else StreamPolicy(mode=mode),
            threshold=lambda: self.threshold,
            emit=lambda turn, result: self._emit(turn, result, origin),
        )

    def _judge(self, turns: list[Turn]) -> list[Verdict]:
        calls.warm_up(self.detector)
        threshold = self.threshold
        seconds = self.policy.timeout_s
        limit = TimeLimit(None if seconds is None else seconds * len(turns))
        cases = [Case(turn=turn, threshold=threshold) for turn in turns]
        filled = [case for case in cases if not case.blank]
        started = time.perf_counter()
        for case, score in zip(filled, calls.score(self.detector, [case.turn for case in filled], limit), strict=True):
            case.note_score(score)
        detector_ms = ms_since(started)
        harmful = [case for case in filled if case.harmful]
        started = time.perf_counter()
        if self.policy.on_harm == "detoxify" and harmful:
            assert self.detoxifier is not None  # held by __init__ for on_harm="detoxify"
            detoxify(harmful, detector=self.detector, detoxifier=self.detoxifier, policy=self.policy, limit=limit)
        detoxifier_ms = ms_since(started)
        for case in filled:
            case.detector_ms = detector_ms
        for case in harmful:
            case.detoxifier_ms = detoxifier_ms
        return [decide(case, self.policy) for case in cases]

    def emit(self, record: GuardRecord) -> None:
        """Gives the record to every sink; an error of a sink is logged and goes no further."""
        self._deliver(record.id, lambda: record)

    def _emit(self, turn: Turn, result: GuardResult, origin: Origin) -> None:
        self._deliver(result.id, lambda: GuardRecord.of(turn, result, origin=origin, trace_content=self.trace_content))

    def _deliver(self, record_id: str, make: Callable[[], GuardRecord]) -> None:
        for sink in self.sinks:
            try:
                sink.emit(make())
            except Exception as error:
                logger.warning("%s lost record %s: %s", name_of(sink), record_id, name_of(error))
