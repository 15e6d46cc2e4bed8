"""The frozen values that enter and leave the guard."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

__all__ = ["GuardResult", "ImageInput", "Origin", "Outcome", "Reason", "RewriteAttempt", "Turn"]


class Outcome(StrEnum):
    """What the guard did with an answer."""

    PASSED = "passed"
    DETOXIFIED = "detoxified"
    WITHHELD = "withheld"
    FLAGGED = "flagged"


class Reason(StrEnum):
    """Why the outcome is what it is."""

    HARMLESS = "harmless"
    """The harm score is below the threshold."""
    BLANK = "blank"
    """The answer is empty or only white space: nothing to judge."""
    REWRITTEN = "rewritten"
    """A rewrite was scored harmless and replaced the answer."""
    HARMFUL = "harmful"
    """The answer is harmful and the policy asks for no rewrite."""
    HARMFUL_ARGUMENTS = "harmful_arguments"
    """An argument of a tool call, or a value of a structured answer, is harmful; such values are never rewritten."""
    REWRITE_REJECTED = "rewrite_rejected"
    """No rewrite was scored harmless within the allowed attempts; none was tried of an answer too long to hold."""
    ERROR = "error"
    """The answer could not be judged; `GuardResult.error` names the error class."""
    TIMEOUT = "timeout"
    """The time limit of the policy ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInput:
    """One image that came with the question: its bytes, or the address it was given by.

    The guard never fetches `url`; it is kept so that a detector which reads images can.
    """

    content: bytes | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)
    media_type: str | None = None

    def __post_init__(self) -> None:
        if (self.content is None) == (self.url is None):
            raise ValueError("give an ImageInput exactly one of content= (bytes) or url= (str)")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Turn:
    """A question and the answer to it, with the images the question came with.

    Attributes:
        question: What was asked. None means "unknown", which is not the same as "".
        answer: The text to judge. Any `str` is accepted, lone surrogates and NUL included.
        images: The images of the question, in order.
    """

    question: str | None = None
    answer: str
    images: tuple[ImageInput, ...] = ()

    def __post_init__(self) -> None:
        # A message object or bytes taken for text would be judged as something else than what is shown.
        if not isinstance(self.answer, str):
            raise TypeError(f"Turn.answer must be str, got {type(self.answer).__name__}")
        if self.question is not None and not isinstance(self.question, str):
            raise TypeError(f"Turn.question must be str or None, got {type(self.question).__name__}")
        object.__setattr__(self, "images", tuple(self.images))

    def __repr__(self) -> str:
        """Lengths only: texts stay out of logs and tracebacks."""
        question = "None" if self.question is None else f"<{len(self.question)} chars>"
        return f"Turn(question={question}, answer=<{len(self.answer)} chars>, images={len(self.images)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a check came from; goes into the record and has no say in the decision.

    Attributes:
        integration: `python`, `cli`, `langchain`, `llama_index`, ...
        question_match: How the question was found: `explicit`, `id`, `text`, `ancestor`, `none`.
        run_id: Id of the framework run that asked for the check.
        parent_run_id: Id of the run around it.
        tags: Free labels of the operator.
    """

    integration: str = "python"
    question_match: str | None = None
    run_id: str | None = None
    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteAttempt:
    """One call of the detoxifier and the score of what it wrote.

    Attributes:
        harm_score: P(harmful) of the rewrite, [0, 1]; None if it was blank or could not be scored.
        chars: Length of the rewrite in characters.
        error: Class name of the error that ended the attempt, if one did.
        duration_ms: Rewriting and scoring together, milliseconds.
    """

    harm_score: float | None
    chars: int
    error: str | None = None
    duration_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardResult:
    """The verdict on one turn, and the only text that may leave.

    Attributes:
        outcome: What was done.
        reason: Why.
        text: What may be shown. Byte-identical to the answer when `outcome` is passed or flagged. Of a stream,
            what left of the answer and, on a new paragraph, what took the place of the rest.
        harm_score: P(harmful) of the answer, [0, 1]; None if it was not or could not be judged.
        threshold: Scores at or above it count as harmful.
        rewrites: Every rewrite that was tried, in order.
        error: Class name of the error that decided the outcome or broke off the stream, if one did.
        released_chars: How many characters of the answer itself left the stream; None if it was no stream.
        detector_ms: Time to score the answer, milliseconds. In a batch, the time of the whole batch.
        detoxifier_ms: Time of all rewrites and their scores, milliseconds, same rule.
        id: Random id, shared with the trace record.
        time: When the check was done, UTC.
    """

    outcome: Outcome
    reason: Reason
    text: str = field(repr=False)
    harm_score: float | None
    threshold: float
    rewrites: tuple[RewriteAttempt, ...] = ()
    error: str | None = None
    released_chars: int | None = None
    detector_ms: float = 0.0
    detoxifier_ms: float = 0.0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    time: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def attempts(self) -> int:
        """How many rewrites were tried."""
        return len(self.rewrites)

    @property
    def rewrite_score(self) -> float | None:
        """P(harmful) of the last rewrite that could be scored, [0, 1]."""
        return next((r.harm_score for r in reversed(self.rewrites) if r.harm_score is not None), None)

    @property
    def harmful(self) -> bool | None:
        """Whether the answer was judged harmful; None if it was not judged."""
        return None if self.harm_score is None else self.harm_score >= self.threshold
