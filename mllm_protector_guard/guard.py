"""The guard: score, rewrite, score again, and let only a harmless text leave.

The loop is the inference algorithm of MLLM-Protector (Pi et al., arXiv 2401.02906) with two additions:
the rewrite is scored before anyone sees it, and an answer for which no harmless rewrite was found is
withheld.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

from mllm_protector_guard import calls
from mllm_protector_guard.calls import has_method, name_of, probability
from mllm_protector_guard.errors import CheckTimeoutError, ConfigError, GuardError, HarmfulAnswerError, InferenceError
from mllm_protector_guard.policy import GuardPolicy
from mllm_protector_guard.ports import Detoxifier, HarmDetector, RecordSink
from mllm_protector_guard.timelimit import TimeLimit
from mllm_protector_guard.tracing.record import GuardRecord
from mllm_protector_guard.types import GuardResult, Origin, Outcome, Reason, RewriteAttempt, Turn

__all__ = ["Guard"]

logger = logging.getLogger(__name__)


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
            return await asyncio.to_thread(self.check_batch, turns, origins=origins, return_exceptions=True)
        return await asyncio.to_thread(self.check_batch, turns, origins=origins)

    def _judge(self, turns: list[Turn]) -> list[_Verdict]:
        calls.warm_up(self.detector)
        threshold = self.threshold
        seconds = self.policy.timeout_s
        limit = TimeLimit(None if seconds is None else seconds * len(turns))
        cases = [_Case(turn=turn, threshold=threshold) for turn in turns]
        filled = [case for case in cases if not case.blank]
        started = time.perf_counter()
        for case, score in zip(filled, calls.score(self.detector, [case.turn for case in filled], limit), strict=True):
            case.note_score(score)
        detector_ms = _ms_since(started)
        harmful = [case for case in filled if case.harmful]
        started = time.perf_counter()
        if self.policy.on_harm == "detoxify" and harmful:
            self._detoxify(harmful, limit)
        detoxifier_ms = _ms_since(started)
        for case in filled:
            case.detector_ms = detector_ms
        for case in harmful:
            case.detoxifier_ms = detoxifier_ms
        return [self._decide(case) for case in cases]

    def _detoxify(self, cases: list[_Case], limit: TimeLimit) -> None:
        detoxifier = self.detoxifier
        assert detoxifier is not None  # held by __init__ for on_harm="detoxify"
        calls.warm_up(detoxifier)
        open_cases = cases
        for attempt in range(self.policy.max_attempts):
            started = time.perf_counter()
            rewrites = calls.rewrite(detoxifier, [case.turn for case in open_cases], attempt, limit)
            written = [
                (case, Turn(question=case.turn.question, answer=text, images=case.turn.images))
                for case, text in zip(open_cases, rewrites, strict=True)
                if isinstance(text, str) and text.strip()
            ]
            scores = calls.score(self.detector, [turn for _, turn in written], limit)
            score_of = {id(case): score for (case, _), score in zip(written, scores, strict=True)}
            duration_ms = _ms_since(started)
            for case, text in zip(open_cases, rewrites, strict=True):
                case.note_attempt(text, score_of.get(id(case)), duration_ms)
            open_cases = [c for c in open_cases if c.rewrite is None and not isinstance(c.error, CheckTimeoutError)]
            if not open_cases:
                return

    def _decide(self, case: _Case) -> _Verdict:
        policy, answer = self.policy, case.turn.answer
        if case.blank:
            return _Verdict(self._result(case, Outcome.PASSED, Reason.BLANK, answer))
        if case.error is not None:
            return self._decide_on_error(case, case.error)
        if case.harm_score is not None and case.harm_score < case.threshold:
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
        logger.warning("check ended with %s; on_error=%r", name_of(error), self.policy.on_error)
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
            threshold=case.threshold,
            rewrites=tuple(case.attempts),
            error=None if case.error is None else name_of(case.error),
            detector_ms=case.detector_ms,
            detoxifier_ms=case.detoxifier_ms,
        )

    def _emit(self, turns: Sequence[Turn], verdicts: list[_Verdict], origins: Sequence[Origin]) -> None:
        if not self.sinks:
            return
        for turn, verdict, origin in zip(turns, verdicts, origins, strict=True):
            for sink in self.sinks:
                try:
                    sink.emit(GuardRecord.of(turn, verdict.result, origin=origin, trace_content=self.trace_content))
                except Exception as error:
                    logger.warning("%s lost record %s: %s", name_of(sink), verdict.result.id, name_of(error))


@dataclass(slots=True)
class _Case:
    """What is known of one turn while it is checked."""

    turn: Turn
    threshold: float
    harm_score: float | None = None
    error: InferenceError | None = None
    rewrite: str | None = None
    attempts: list[RewriteAttempt] = field(default_factory=list)
    detector_ms: float = 0.0
    detoxifier_ms: float = 0.0

    @property
    def blank(self) -> bool:
        return not self.turn.answer or self.turn.answer.isspace()

    @property
    def harmful(self) -> bool:
        return self.harm_score is not None and self.harm_score >= self.threshold

    def note_score(self, score: float | InferenceError) -> None:
        if isinstance(score, InferenceError):
            self.error = score
        else:
            self.harm_score = score

    def note_attempt(self, text: str | InferenceError, score: float | InferenceError | None, ms: float) -> None:
        failure = next((value for value in (text, score) if isinstance(value, InferenceError)), None)
        number = score if isinstance(score, float) else None
        self.error = failure
        self.attempts.append(
            RewriteAttempt(
                harm_score=number,
                chars=len(text) if isinstance(text, str) else 0,
                error=None if failure is None else name_of(failure),
                duration_ms=ms,
            )
        )
        if number is not None and number < self.threshold and isinstance(text, str):
            self.rewrite = text


@dataclass(frozen=True, slots=True)
class _Verdict:
    result: GuardResult
    error: GuardError | None = None


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000.0
