"""Rewrites that are kept apart from the harmful answers they belong to, and joined with them by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mllm_protector_guard.errors import DataError
from mllm_protector_guard.jsonl import AnyText, read_rows, validate_row
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow

__all__ = ["Target", "join_targets", "turn_sha256"]


class Target(BaseModel):
    """A harmless answer for the turn with this hash.

    Attributes:
        sha256: `turn_sha256` of the question and the harmful answer.
        accepted: The rewrite.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: str
    accepted: AnyText
    extra: dict[str, Any] = {}


def turn_sha256(question: str | None, answer: str) -> str:
    """SHA-256 of a question and an answer, hexadecimal; texts can be told apart by it, and not be read."""
    text = f"{question or ''}\0{answer}"
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def join_targets(
    paths: Iterable[str | Path], rewrites: Sequence[RewriteRow], answers: Sequence[AnswerRow]
) -> list[RewriteRow]:
    """A row for each target, with the question, the harmful answer, source and licence of the row that has its hash.

    The rows belong to the file of the target, so that a recipe can name them as `file:<name before the first dot>`.

    Args:
        paths: Files of `{"sha256", "accepted"}`.
        rewrites: Rows whose `rejected` a target may be for; or whose `accepted`, since the better of two answers can
            be a harmful one.
        answers: Harmful answers that a target may be for.

    Raises:
        DataError: A line does not fit, or no row has its hash.
    """
    found: dict[str, tuple[RewriteRow | AnswerRow, str]] = {}
    for pair in rewrites:
        for answer in (pair.rejected, pair.accepted):
            found.setdefault(turn_sha256(pair.question, answer), (pair, answer))
    for row in answers:
        if row.harmful:
            found.setdefault(turn_sha256(row.question, row.answer), (row, row.answer))
    joined: list[RewriteRow] = []
    for path in paths:
        name = Path(path).name.partition(".")[0]
        missing = 0
        for line, fields in read_rows(path):
            target = validate_row(Target, fields, path=path, line=line)
            if target.sha256 not in found:
                missing += 1
                continue
            owner, rejected = found[target.sha256]
            joined.append(
                RewriteRow(
                    question=owner.question,
                    rejected=rejected,
                    accepted=target.accepted,
                    source=owner.source,
                    extra=owner.extra,
                    file=name,
                )
            )
        if missing:
            raise DataError(
                f"{missing} targets are for answers that are in none of the given files; give those too", path=path
            )
    return joined
