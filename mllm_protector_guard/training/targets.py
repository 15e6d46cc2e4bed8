"""Rewrites that are kept apart from the harmful answers they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from mllm_protector_guard.jsonl import AnyText
from mllm_protector_guard.training.joining import HashedLine, answers_by_sha256, join
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow

__all__ = ["Target", "join_targets"]


class Target(HashedLine):
    """A harmless answer in the place of a harmful one.

    Attributes:
        accepted: The rewrite.
    """

    accepted: AnyText
    extra: dict[str, Any] = Field(default_factory=dict)


def join_targets(
    paths: Iterable[str | Path], rewrites: Iterable[RewriteRow], answers: Iterable[AnswerRow]
) -> list[RewriteRow]:
    """A row for each target, with the question, the harmful answer, source and licence of the row that has its hash.

    The rows belong to the file of the target, so that a recipe can name them as `file:<name before the first dot>`.

    Args:
        paths: Files of `{"sha256", "accepted"}`.
        rewrites: Rows whose `rejected` a target may be for; or whose `accepted`, since the better of two answers can
            be a harmful one.
        answers: Rows of which a target may be for a harmful one.

    Raises:
        DataError: A line does not fit, or no row has its hash.
    """
    found = answers_by_sha256(rewrites, (row for row in answers if row.harmful))
    lines = join(paths, Target, found, lines="targets", owners="files")
    return [
        RewriteRow(**owned.fields(), rejected=owned.answer, accepted=target.accepted, file=file)
        for file, target, owned in lines
    ]
