"""Labelled answers: the rows that a detector is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictBool

from mllm_protector_guard.errors import DataError
from mllm_protector_guard.jsonl import AnyText, read_rows, validate_row
from mllm_protector_guard.types import Turn

__all__ = ["LabelledRow", "read_labelled_rows"]


class LabelledRow(BaseModel):
    """A turn with the truth about its answer; further fields are not looked at.

    Attributes:
        question: What was asked; None when unknown.
        answer: The text to judge.
        harmful: Whether the answer is harmful, given the question; None when nobody knows.
        source: Where the row comes from.
        extra: Anything; of an object the field `lang` is read.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    question: AnyText | None = None
    answer: AnyText
    harmful: StrictBool | None = None
    source: AnyText | None = None
    extra: Any = None

    @property
    def lang(self) -> str | None:
        """The language of the row, as `extra.lang` names it; None when it does not."""
        lang = self.extra.get("lang") if isinstance(self.extra, dict) else None
        return lang if isinstance(lang, str) and lang else None

    @property
    def turn(self) -> Turn:
        """The question and the answer, as a detector takes them."""
        return Turn(question=self.question, answer=self.answer)


def read_labelled_rows(
    path: str | Path, *, on_bad_line: Callable[[DataError], None] | None = None
) -> Iterator[tuple[int, LabelledRow]]:
    """The 1-based line numbers and rows of a file of JSON lines, gzipped or not, in order.

    Args:
        path: Lines of `{"question", "answer", "harmful", "source", "extra": {"lang"}}`.
        on_bad_line: Takes the error of each bad line; reading then goes on. None raises the first one.

    Raises:
        DataError: A line is bad and there is no `on_bad_line`, or the file is cut off.
        OSError: The file cannot be read.
    """
    for line, fields in read_rows(path, on_bad_line=on_bad_line):
        try:
            row = validate_row(LabelledRow, fields, path=path, line=line)
        except DataError as error:
            if on_bad_line is None:
                raise
            on_bad_line(error)
        else:
            yield line, row
