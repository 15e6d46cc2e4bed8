"""Lines that are kept apart from the answers they are about, and joined with them by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from mllm_protector_guard.errors import DataError
from mllm_protector_guard.jsonl import read_rows, validate_row
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow

__all__ = ["HashedLine", "Owned", "answers_by_sha256", "join", "turn_sha256"]


class HashedLine(BaseModel):
    """A line about the answer of the turn with this hash.

    Attributes:
        sha256: `turn_sha256` of the question and the answer.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: str


class Owned(NamedTuple):
    """An answer and the row that it is in."""

    row: RewriteRow | AnswerRow
    answer: str

    def fields(self) -> dict[str, Any]:
        """What a joined row takes over from the owner."""
        return {"question": self.row.question, "source": self.row.source, "extra": self.row.extra}


L = TypeVar("L", bound=HashedLine)


def turn_sha256(question: str | None, answer: str) -> str:
    """SHA-256 of a question and an answer, hexadecimal; texts can be told apart by it, and not be read."""
    text = f"{question or ''}\0{answer}"
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def answers_by_sha256(pairs: Iterable[RewriteRow], answers: Iterable[AnswerRow] = ()) -> dict[str, Owned]:
    """The answers of all rows, both of a pair, by `turn_sha256`; the first row of several owns its answer."""
    found: dict[str, Owned] = {}
    for pair in pairs:
        for answer in (pair.rejected, pair.accepted):
            found.setdefault(turn_sha256(pair.question, answer), Owned(pair, answer))
    for row in answers:
        found.setdefault(turn_sha256(row.question, row.answer), Owned(row, row.answer))
    return found


def join(
    paths: Iterable[str | Path],
    model: type[L],
    found: Mapping[str, Owned],
    *,
    lines: str,
    owners: str,
) -> Iterator[tuple[str, L, Owned]]:
    """Each line with the answer it is about, and the name of its file up to the first dot.

    Args:
        paths: Files of lines with `sha256`.
        model: What a line holds.
        found: The answers, by hash.
        lines: What the lines are called in an error.
        owners: What holds the answers, in an error.

    Raises:
        DataError: A line does not fit, or no answer has its hash.
    """
    for path in paths:
        name = Path(path).name.partition(".")[0]
        missing = 0
        for number, fields in read_rows(path):
            line = validate_row(model, fields, path=path, line=number)
            if line.sha256 in found:
                yield name, line, found[line.sha256]
            else:
                missing += 1
        if missing:
            raise DataError(
                f"{missing} {lines} are for answers that are in none of the given {owners}; give those too", path=path
            )
