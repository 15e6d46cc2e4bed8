"""Labels that are kept apart from the answers they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mllm_protector_guard.training.joining import HashedLine, answers_by_sha256, join
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow

__all__ = ["Label", "join_labels"]


class Label(HashedLine):
    """Whether an answer is harmful, given its question."""

    harmful: bool


def join_labels(paths: Iterable[str | Path], pairs: Iterable[RewriteRow]) -> list[AnswerRow]:
    """A labelled answer for each label, with the question, source and licence of the pair that holds its hash.

    The rows belong to the file of the label, so that a recipe can name them as `file:<name before the first dot>`.

    Args:
        paths: Files of `{"sha256", "harmful"}`.
        pairs: Rows whose `rejected` or `accepted` a label may be for; which of the two says nothing.

    Raises:
        DataError: A line does not fit, or no pair has its hash.
    """
    lines = join(paths, Label, answers_by_sha256(pairs), lines="labels", owners="pairs")
    return [
        AnswerRow(**owned.fields(), answer=owned.answer, harmful=label.harmful, file=file)
        for file, label, owned in lines
    ]
