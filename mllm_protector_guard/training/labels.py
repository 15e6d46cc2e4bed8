"""Labels that are kept apart from the answers they belong to, and joined with them by hash."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mllm_protector_guard.errors import DataError
from mllm_protector_guard.jsonl import read_rows, validate_row
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow
from mllm_protector_guard.training.targets import turn_sha256

__all__ = ["Label", "join_labels"]


class Label(BaseModel):
    """Whether the answer of the turn with this hash is harmful, given its question.

    Attributes:
        sha256: `turn_sha256` of the question and the answer.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: str
    harmful: bool


def join_labels(paths: Iterable[str | Path], pairs: Sequence[RewriteRow]) -> list[AnswerRow]:
    """A labelled answer for each label, with the question, source and licence of the pair that holds its hash.

    The rows belong to the file of the label, so that a recipe can name them as `file:<name before the first dot>`.

    Args:
        paths: Files of `{"sha256", "harmful"}`.
        pairs: Rows whose `rejected` or `accepted` a label may be for; which of the two says nothing.

    Raises:
        DataError: A line does not fit, or no pair has its hash.
    """
    found: dict[str, tuple[RewriteRow, str]] = {}
    for pair in pairs:
        for answer in (pair.rejected, pair.accepted):
            found.setdefault(turn_sha256(pair.question, answer), (pair, answer))
    joined: list[AnswerRow] = []
    for path in paths:
        name = Path(path).name.partition(".")[0]
        missing = 0
        for line, fields in read_rows(path):
            label = validate_row(Label, fields, path=path, line=line)
            if label.sha256 not in found:
                missing += 1
                continue
            owner, answer = found[label.sha256]
            joined.append(
                AnswerRow(
                    question=owner.question,
                    answer=answer,
                    harmful=label.harmful,
                    source=owner.source,
                    extra=owner.extra,
                    file=name,
                )
            )
        if missing:
            raise DataError(
                f"{missing} labels are for answers that are in none of the given pairs; give those too", path=path
            )
    return joined
