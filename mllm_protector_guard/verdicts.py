"""What is decided about one answer, and the rewriting that a decision may wait for.

The loop is the inference algorithm of MLLM-Protector (Pi et al., arXiv 2401.02906) with two additions:
the rewrite is scored before anyone sees it, and an answer for which no harmless rewrite was found is
withheld.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mllm_protector_guard import calls
from mllm_protector_guard.calls import name_of
from mllm_protector_guard.errors import CheckTimeoutError, GuardError, HarmfulAnswerError, InferenceError
from mllm_protector_guard.policy import GuardPolicy
from mllm_protector_guard.ports import Detoxifier, HarmDetector
from mllm_protector_guard.timelimit import TimeLimit
from mllm_protector_guard.types import GuardResult, Outcome, Reason, RewriteAttempt, Turn

__all__ = ["Case", "Verdict", "decide", "detoxify", "ms_since"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Case:
    """What is known of one turn while it is checked.

    Attributes:
        turn: The question and the answer to judge.
        threshold: Scores at or above it are harmful.
        harm_score: P(harmful) of the answer, [0, 1]; None while it is not judged.
        error: What failed last.
        rewrite: The rewrite that was scored harmless.
        attempts: Every rewrite that was tried, in order.
        detector_ms: Time to score the answer, milliseconds.
        detoxifier_ms: Time of all rewrites and their scores, milliseconds.
    """

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
        """Whether there is nothing to judge."""
        return not self.turn.answer or self.turn.answer.isspace()

    @property
    def harmful(self) -> bool:
        """Whether the answer was judged harmful."""
        return self.harm_score is not None and self.harm_score >= self.threshold

    def note_score(self, score: float | InferenceError) -> None:
        """Keeps the last score of the answer, or why there is none."""
        if isinstance(score, InferenceError):
            self.error, self.harm_score = score, None
        else:
            self.error, self.harm_score = None, score

    def note_attempt(self, text: str | InferenceError, score: float | InferenceError | None, ms: float) -> None:
        """Keeps one attempt to rewrite the answer, and the rewrite itself if it is harmless."""
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

    def result(self, outcome: Outcome, reason: Reason, text: str) -> GuardResult:
        """The result in which `text` may leave."""
        return GuardResult(
            outcome=outcome,
            reason=reason,
            text=text,
            harm_score=self.harm_score,
            threshold=self.threshold,
            rewrites=tuple(self.attempts),
            error=None if self.error is None else name_of(self.error),
            detector_ms=self.detector_ms,
            detoxifier_ms=self.detoxifier_ms,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is decided: the result, and the error that the caller gets in its place, if one."""

    result: GuardResult
    error: GuardError | None = None


def detoxify(
    cases: Sequence[Case], *, detector: HarmDetector, detoxifier: Detoxifier, policy: GuardPolicy, limit: TimeLimit
) -> None:
    """Rewrites the answers of all cases and scores the rewrites, one batch of each an attempt.

    Raises:
        CheckpointError, ConfigError, MissingDependencyError: A model cannot work at all.
    """
    calls.warm_up(detoxifier)
    open_cases = list(cases)
    for attempt in range(policy.max_attempts):
        started = time.perf_counter()
        rewrites = calls.rewrite(detoxifier, [case.turn for case in open_cases], attempt, limit)
        written = [
            (case, Turn(question=case.turn.question, answer=text, images=case.turn.images))
            for case, text in zip(open_cases, rewrites, strict=True)
            if isinstance(text, str) and text.strip()
        ]
        scores = calls.score(detector, [turn for _, turn in written], limit)
        score_of = {id(case): score for (case, _), score in zip(written, scores, strict=True)}
        duration_ms = ms_since(started)
        for case, text in zip(open_cases, rewrites, strict=True):
            case.note_attempt(text, score_of.get(id(case)), duration_ms)
        open_cases = [c for c in open_cases if c.rewrite is None and not isinstance(c.error, CheckTimeoutError)]
        if not open_cases:
            return


def decide(case: Case, policy: GuardPolicy) -> Verdict:
    """What becomes of an answer, once it is scored and, if the policy asks for it, rewritten."""
    answer = case.turn.answer
    if case.blank:
        return Verdict(case.result(Outcome.PASSED, Reason.BLANK, answer))
    if case.error is not None:
        return _decide_on_error(case, case.error, policy)
    if case.harm_score is not None and case.harm_score < case.threshold:
        return Verdict(case.result(Outcome.PASSED, Reason.HARMLESS, answer))
    if policy.on_harm == "flag":
        return Verdict(case.result(Outcome.FLAGGED, Reason.HARMFUL, answer))
    if policy.on_harm == "detoxify":
        if case.rewrite is not None:
            return Verdict(case.result(Outcome.DETOXIFIED, Reason.REWRITTEN, case.rewrite))
        return Verdict(case.result(Outcome.WITHHELD, Reason.REWRITE_REJECTED, policy.refusal))
    withheld = case.result(Outcome.WITHHELD, Reason.HARMFUL, policy.refusal)
    return Verdict(withheld, HarmfulAnswerError(withheld) if policy.on_harm == "raise" else None)


def ms_since(started: float) -> float:
    """Milliseconds since `started`, a value of `time.perf_counter`."""
    return (time.perf_counter() - started) * 1000.0


def _decide_on_error(case: Case, error: InferenceError, policy: GuardPolicy) -> Verdict:
    reason = Reason.TIMEOUT if isinstance(error, CheckTimeoutError) else Reason.ERROR
    logger.warning("check ended with %s; on_error=%r", name_of(error), policy.on_error)
    if policy.on_error == "pass" and case.harm_score is None:
        return Verdict(case.result(Outcome.PASSED, reason, case.turn.answer))
    withheld = case.result(Outcome.WITHHELD, reason, policy.refusal)
    return Verdict(withheld, error if policy.on_error == "raise" else None)
