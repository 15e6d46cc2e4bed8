"""The guard: score, rewrite, score again, and let only a harmless text leave.

The loop is the inference algorithm of MLLM-Protector (Pi et al., arXiv 2401.02906) with two additions:
the rewrite is scored before anyone sees it, and an answer for which no harmless rewrite was found is
withheld.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeVar, overload

from mllm_protector_guard.errors import (
    CheckTimeoutError,
    ConfigError,
    DetectorError,
    DetoxifierError,
    GuardError,
    HarmfulAnswerError,
    InferenceError,
)
from mllm_protector_guard.policy import GuardPolicy
from mllm_protector_guard.ports import Detoxifier, HarmDetector, RecordSink
from mllm_protector_guard.tracing.record import GuardRecord
from mllm_protector_guard.types import GuardResult, Origin, Outcome, Reason, RewriteAttempt, Turn

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
        >>> guard = Guard(detector=KeywordDetector({"bomb"}), detoxifier=ScriptedDetoxifier(["No, but ask me about gardens."]))
        >>> guard.check(Turn(question="How?", answer="Build a bomb.")).text
        'No, but ask me about gardens.'
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
        if not callable(getattr(detector, "score", None)):
            raise ConfigError(f"a guard needs a detector with a score() method, got {type(detector).__name__}")
        if self.policy.on_harm == "detoxify" and not callable(getattr(detoxifier, "rewrite", None)):
            raise ConfigError(
                "on_harm='detoxify' needs a detoxifier with a rewrite() method, "
                f"got {type(detoxifier).__name__}. Give detoxifier=, or set on_harm to 'withhold', 'flag' or 'raise'."
            )

    @property
    def threshold(self) -> float:
        """Scores at or above it are harmful: the policy's, else the detector's own, else 0.5."""
        if self.policy.threshold is not None:
            return self.policy.threshold
        return float(getattr(self.detector, "threshold", 0.5))

    def warm_up(self) -> None:
        """Loads both models now instead of at the first check.

        Raises:
            CheckpointError: A model cannot be loaded.
        """
        _warm_up(self.detector)
        if self.policy.on_harm == "detoxify":
            _warm_up(self.detoxifier)

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
        self._emit(turns, verdicts, origins or [Origin()] * len(turns))
        if return_exceptions:
            return [verdict.error or verdict.result for verdict in verdicts]
        for verdict in verdicts:
            if verdict.error is not None:
                raise verdict.error
        return [verdict.result for verdict in verdicts]

    async def acheck(self, turn: Turn, *, origin: Origin | None = None) -> GuardResult:
        """`check` in a worker thread; the event loop stays free."""
        return await asyncio.to_thread(self.check, turn, origin=origin)

    async def acheck_batch(
        self, turns: Sequence[Turn], *, origins: Sequence[Origin] | None = None
    ) -> list[GuardResult]:
        """`check_batch` in a worker thread; the event loop stays free."""
        return await asyncio.to_thread(self.check_batch, turns, origins=origins)

    def _judge(self, turns: list[Turn]) -> list[_Verdict]:
        _warm_up(self.detector)
        clock = _Clock(self.policy.timeout_s, len(turns))
        cases = [_Case(turn=turn) for turn in turns]
        filled = [case for case in cases if case.turn.answer and not case.turn.answer.isspace()]
        started = time.perf_counter()
        for case, score in zip(filled, self._score([case.turn for case in filled], clock), strict=True):
            if isinstance(score, InferenceError):
                case.error = score
            else:
                case.harm_score = score
        detector_ms = _ms_since(started)
        harmful = [c for c in filled if c.harm_score is not None and c.harm_score >= self.threshold]
        started = time.perf_counter()
        if self.policy.on_harm == "detoxify" and harmful:
            self._detoxify(harmful, clock)
        detoxifier_ms = _ms_since(started)
        for case in filled:
            case.detector_ms = detector_ms
        for case in harmful:
            case.detoxifier_ms = detoxifier_ms
        return [self._decide(case) for case in cases]

    def _score(self, turns: list[Turn], clock: _Clock) -> list[float | InferenceError]:
        """Checked scores; a failed batch is scored again one by one, so that neighbours do not suffer."""
        if not turns:
            return []
        try:
            scores = clock.run(lambda: self.detector.score(turns))
            if len(scores) != len(turns):
                raise DetectorError(f"the detector gave {len(scores)} scores for {len(turns)} turns")
        except CheckTimeoutError as error:
            return [error for _ in turns]
        except Exception as error:
            if len(turns) > 1:
                return [score for turn in turns for score in self._score([turn], clock)]
            return [_as_inference_error(error, DetectorError, self.detector)]
        return [_checked_score(score) for score in scores]

    def _detoxify(self, cases: list[_Case], clock: _Clock) -> None:
        _warm_up(self.detoxifier)
        open_cases = cases
        for attempt in range(self.policy.max_attempts):
            started = time.perf_counter()
            rewrites = self._rewrite([case.turn for case in open_cases], attempt, clock)
            written = [
                (case, Turn(question=case.turn.question, answer=text, images=case.turn.images))
                for case, text in zip(open_cases, rewrites, strict=True)
                if isinstance(text, str) and text.strip()
            ]
            scores = self._score([turn for _, turn in written], clock)
            score_of = {id(case): score for (case, _), score in zip(written, scores, strict=True)}
            duration_ms = _ms_since(started)
            for case, text in zip(open_cases, rewrites, strict=True):
                case.note_attempt(text, score_of.get(id(case)), self.threshold, duration_ms)
            open_cases = [c for c in open_cases if c.rewrite is None and not isinstance(c.error, CheckTimeoutError)]
            if not open_cases:
                return

    def _rewrite(self, turns: list[Turn], attempt: int, clock: _Clock) -> list[str | InferenceError]:
        detoxifier = self.detoxifier
        assert detoxifier is not None  # held by __init__ for on_harm="detoxify"
        try:
            rewrites = clock.run(lambda: detoxifier.rewrite(turns, attempt=attempt))
            if len(rewrites) != len(turns) or not all(isinstance(text, str) for text in rewrites):
                raise DetoxifierError(f"the detoxifier gave {len(rewrites)} rewrites for {len(turns)} turns, or no str")
        except CheckTimeoutError as error:
            return [error for _ in turns]
        except Exception as error:
            if len(turns) > 1:
                return [text for turn in turns for text in self._rewrite([turn], attempt, clock)]
            return [_as_inference_error(error, DetoxifierError, detoxifier)]
        return list(rewrites)

    def _decide(self, case: _Case) -> _Verdict:
        policy, answer = self.policy, case.turn.answer
        if case.harm_score is None and case.error is None:
            return _Verdict(self._result(case, Outcome.PASSED, Reason.BLANK, answer))
        if case.error is not None and case.rewrite is None:
            return self._decide_on_error(case, case.error)
        if case.harm_score is not None and case.harm_score < self.threshold:
            return _Verdict(self._result(case, Outcome.PASSED, Reason.HARMLESS, answer))
        if policy.on_harm == "flag":
            return _Verdict(self._result(case, Outcome.FLAGGED, Reason.HARMFUL, answer))
        if policy.on_harm == "detoxify":
            if case.rewrite is not None:
                return _Verdict(self._result(case, Outcome.DETOXIFIED, Reason.REWRITTEN, case.rewrite))
            return _Verdict(self._result(case, Outcome.WITHHELD, Reason.REWRITE_REJECTED, policy.refusal))
        withheld = self._result(case, Outcome.WITHHELD, Reason.HARMFUL, policy.refusal)
        return _Verdict(withheld, HarmfulAnswerError(withheld) if policy.on_harm == "raise" else None)

    def _decide_on_error(self, case: _Case, error: InferenceError) -> _Verdict:
        reason = Reason.TIMEOUT if isinstance(error, CheckTimeoutError) else Reason.ERROR
        logger.warning("check ended with %s; on_error=%r", type(error).__name__, self.policy.on_error)
        if self.policy.on_error == "pass" and case.harm_score is None:
            return _Verdict(self._result(case, Outcome.PASSED, reason, case.turn.answer))
        withheld = self._result(case, Outcome.WITHHELD, reason, self.policy.refusal)
        return _Verdict(withheld, error if self.policy.on_error == "raise" else None)

    def _result(self, case: _Case, outcome: Outcome, reason: Reason, text: str) -> GuardResult:
        return GuardResult(
            outcome=outcome,
            reason=reason,
            text=text,
            harm_score=case.harm_score,
            threshold=self.threshold,
            rewrites=tuple(case.attempts),
            error=None if case.error is None else type(case.error).__name__,
            detector_ms=case.detector_ms,
            detoxifier_ms=case.detoxifier_ms,
        )

    def _emit(self, turns: Sequence[Turn], verdicts: list[_Verdict], origins: Sequence[Origin]) -> None:
        if not self.sinks:
            return
        for turn, verdict, origin in zip(turns, verdicts, origins, strict=True):
            record = GuardRecord.of(turn, verdict.result, origin=origin, trace_content=self.trace_content)
            for sink in self.sinks:
                try:
                    sink.emit(record)
                except Exception as error:
                    logger.warning("%s lost record %s: %s", type(sink).__name__, record.id, type(error).__name__)


@dataclass(slots=True)
class _Case:
    """What is known of one turn while it is checked."""

    turn: Turn
    harm_score: float | None = None
    error: InferenceError | None = None
    rewrite: str | None = None
    attempts: list[RewriteAttempt] = field(default_factory=list)
    detector_ms: float = 0.0
    detoxifier_ms: float = 0.0

    def note_attempt(
        self, text: str | InferenceError, score: float | InferenceError | None, threshold: float, duration_ms: float
    ) -> None:
        failure = next((value for value in (text, score) if isinstance(value, InferenceError)), None)
        number = score if isinstance(score, float) else None
        self.error = failure
        self.attempts.append(
            RewriteAttempt(
                harm_score=number,
                chars=len(text) if isinstance(text, str) else 0,
                error=None if failure is None else type(failure).__name__,
                duration_ms=duration_ms,
            )
        )
        if number is not None and number < threshold and isinstance(text, str):
            self.rewrite = text


@dataclass(frozen=True, slots=True)
class _Verdict:
    result: GuardResult
    error: GuardError | None = None


class _Clock:
    """Holds model calls to what is left of a time limit; the time of other work is not counted."""

    def __init__(self, timeout_s: float | None, checks: int) -> None:
        self._left_s = None if timeout_s is None else timeout_s * checks

    def run(self, call: Callable[[], T]) -> T:
        """The value of `call()`.

        Python cannot stop a thread: a call that overruns is left to end by itself and its value is dropped.
        """
        if self._left_s is None:
            return call()
        done: Future[T] = Future()
        context = contextvars.copy_context()
        threading.Thread(target=_settle, args=(done, context, call), name="mllm-protector-check", daemon=True).start()
        started = time.perf_counter()
        try:
            value = done.result(timeout=max(self._left_s, 0.0))
        except TimeoutError as error:
            if done.done():
                raise
            raise CheckTimeoutError("the check ran out of GuardPolicy.timeout_s; raise it or use a faster model") from error
        finally:
            self._left_s -= time.perf_counter() - started
        return value


def _settle(done: Future[T], context: contextvars.Context, call: Callable[[], T]) -> None:
    try:
        done.set_result(context.run(call))
    except BaseException as error:
        done.set_exception(error)


def _warm_up(model: object) -> None:
    load = getattr(model, "warm_up", None)
    if callable(load):
        load()


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000.0


def _checked_score(score: object) -> float | DetectorError:
    if isinstance(score, (int, float)) and math.isfinite(score) and 0.0 <= score <= 1.0:
        return float(score)
    return DetectorError(f"the detector gave {score!r}; a harm score is a finite number in [0, 1]")


def _as_inference_error(error: Exception, kind: type[InferenceError], model: object) -> InferenceError:
    if isinstance(error, InferenceError):
        return error
    wrapped = kind(f"{type(model).__name__} failed with {type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped
