"""The record of one check."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mllm_protector_guard.types import GuardResult, Origin, Turn

__all__ = ["GuardRecord", "RewriteRecord"]


class RewriteRecord(BaseModel):
    """One rewrite: its score and cost, never its text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    harm_score: float | None
    chars: int
    error: str | None
    duration_ms: float


class GuardRecord(BaseModel):
    """Everything an operator may want to know later of one check; a fixed schema with a version.

    Texts are kept as SHA-256 hashes and lengths. With `trace_content=True` the texts themselves are kept
    too. Lone surrogates, which JSON in UTF-8 cannot hold, become U+FFFD in kept texts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    id: str
    time: datetime
    integration: str
    run_id: str | None = None
    parent_run_id: str | None = None
    tags: dict[str, str] = {}
    outcome: str
    reason: str
    error: str | None = None
    harm_score: float | None
    threshold: float
    rewrite_score: float | None = None
    attempts: int
    rewrites: tuple[RewriteRecord, ...] = ()
    question_match: str | None = None
    question_known: bool
    images: int
    question_chars: int
    answer_chars: int
    text_chars: int
    released_chars: int | None = None
    question_sha256: str | None
    answer_sha256: str
    text_sha256: str
    detector_ms: float
    detoxifier_ms: float
    question: str | None = Field(default=None, repr=False)
    answer: str | None = Field(default=None, repr=False)
    text: str | None = Field(default=None, repr=False)

    @classmethod
    def of(
        cls, turn: Turn, result: GuardResult, *, origin: Origin | None = None, trace_content: bool = False
    ) -> GuardRecord:
        """The record of `result`, the verdict on `turn`; the same arguments give the same record."""
        origin = origin or Origin()
        return cls(
            id=result.id,
            time=result.time,
            integration=origin.integration,
            run_id=origin.run_id,
            parent_run_id=origin.parent_run_id,
            tags=dict(origin.tags),
            outcome=result.outcome.value,
            reason=result.reason.value,
            error=result.error,
            harm_score=result.harm_score,
            threshold=result.threshold,
            rewrite_score=result.rewrite_score,
            attempts=result.attempts,
            rewrites=tuple(
                RewriteRecord(harm_score=r.harm_score, chars=r.chars, error=r.error, duration_ms=r.duration_ms)
                for r in result.rewrites
            ),
            question_match=origin.question_match,
            question_known=turn.question is not None,
            images=len(turn.images),
            question_chars=len(turn.question or ""),
            answer_chars=len(turn.answer),
            text_chars=len(result.text),
            released_chars=result.released_chars,
            question_sha256=None if turn.question is None else _sha256(turn.question),
            answer_sha256=_sha256(turn.answer),
            text_sha256=_sha256(result.text),
            detector_ms=result.detector_ms,
            detoxifier_ms=result.detoxifier_ms,
            question=_storable(turn.question) if trace_content and turn.question is not None else None,
            answer=_storable(turn.answer) if trace_content else None,
            text=_storable(result.text) if trace_content else None,
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _storable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
