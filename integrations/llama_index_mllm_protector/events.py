"""Instrumentation events of the guard.

Any event handler on LlamaIndex's root dispatcher gets them:

    import llama_index.core.instrumentation as instrument
    instrument.get_dispatcher().add_event_handler(handler)
"""

from __future__ import annotations

import llama_index.core.instrumentation as instrument
from llama_index.core.instrumentation.events import BaseEvent

from mllm_protector_guard import GuardResult, Outcome, Turn

__all__ = ["ProtectorRewriteEvent", "ProtectorScoreEvent", "send_events"]

dispatcher = instrument.get_dispatcher(__name__)  # type: ignore[attr-defined]  # public, but not in an __all__


class ProtectorScoreEvent(BaseEvent):
    """An answer or a node was judged; one event a verdict.

    A check that ended in an `InferenceError` (`on_error="raise"`) has no verdict and sends none.

    Attributes:
        check_id: Id of the check, the same in its rewrite events and its record.
        harm_score: P(harmful), [0, 1]; None if it was not or could not be judged.
        threshold: Scores at or above it are harmful.
        outcome: passed, detoxified, withheld or flagged.
        reason: Why, as in `GuardResult.reason`.
        attempts: How many rewrites were tried.
        error: Class name of the error that decided the outcome, if one did.
        question_known: Whether the detector was given the question.
        duration_ms: Time of the detector for the whole batch, milliseconds.
        question: The question; only with `trace_content=True`.
        answer: What was judged; only with `trace_content=True`.
    """

    check_id: str
    harm_score: float | None
    threshold: float
    outcome: str
    reason: str
    attempts: int
    error: str | None = None
    question_known: bool
    duration_ms: float
    question: str | None = None
    answer: str | None = None

    @classmethod
    def class_name(cls) -> str:
        """Name of the event in serialised form."""
        return "ProtectorScoreEvent"


class ProtectorRewriteEvent(BaseEvent):
    """A harmful answer or node was rewritten and the rewrite was scored; one event an attempt.

    Attributes:
        check_id: Id of the check.
        attempt: 0 for the first rewrite.
        accepted: Whether this rewrite took the place of the answer.
        harm_score: P(harmful) of the rewrite, [0, 1]; None if it was blank or could not be scored.
        threshold: Scores at or above it are harmful.
        chars: Length of the rewrite in characters.
        error: Class name of the error that ended the attempt, if one did.
        duration_ms: Rewriting and scoring together for the whole batch, milliseconds.
        text: The rewrite, if accepted; only with `trace_content=True`.
    """

    check_id: str
    attempt: int
    accepted: bool
    harm_score: float | None
    threshold: float
    chars: int
    error: str | None = None
    duration_ms: float
    text: str | None = None

    @classmethod
    def class_name(cls) -> str:
        """Name of the event in serialised form."""
        return "ProtectorRewriteEvent"


def send_events(turn: Turn, result: GuardResult, *, trace_content: bool) -> None:
    """Sends one score event and one event for each rewrite to LlamaIndex's dispatcher."""
    dispatcher.event(
        ProtectorScoreEvent(
            check_id=result.id,
            harm_score=result.harm_score,
            threshold=result.threshold,
            outcome=result.outcome.value,
            reason=result.reason.value,
            attempts=result.attempts,
            error=result.error,
            question_known=turn.question is not None,
            duration_ms=result.detector_ms,
            question=turn.question if trace_content else None,
            answer=turn.answer if trace_content else None,
        )
    )
    last = result.attempts - 1
    for attempt, rewrite in enumerate(result.rewrites):
        accepted = result.outcome is Outcome.DETOXIFIED and attempt == last
        dispatcher.event(
            ProtectorRewriteEvent(
                check_id=result.id,
                attempt=attempt,
                accepted=accepted,
                harm_score=rewrite.harm_score,
                threshold=result.threshold,
                chars=rewrite.chars,
                error=rewrite.error,
                duration_ms=rewrite.duration_ms,
                text=result.text if accepted and trace_content else None,
            )
        )
