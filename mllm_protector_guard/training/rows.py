"""Reads and chooses training rows."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from mllm_protector_guard.errors import ConfigError, DataError
from mllm_protector_guard.jsonl import AnyText, read_rows, validate_row
from mllm_protector_guard.training.config import SourceRecipe

__all__ = ["AnswerRow", "RewriteRow", "choose", "licensed", "read_training_rows"]

logger = logging.getLogger(__name__)


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    question: AnyText | None = None
    source: str = "unknown"
    extra: dict[str, Any] = {}
    file: str = ""

    @property
    def group(self) -> str:
        """The source, with the language where the row tells it."""
        lang = self.extra.get("lang")
        return f"{self.source}:{lang}" if lang else self.source


class AnswerRow(_Row):
    """A labelled answer; `harmful` is about the answer, given the question."""

    answer: AnyText
    harmful: bool | None


class RewriteRow(_Row):
    """A harmful answer and a harmless one to the same question."""

    rejected: AnyText
    accepted: AnyText


R = TypeVar("R", AnswerRow, RewriteRow)


def read_training_rows(paths: Iterable[str | Path], model: type[R]) -> list[R]:
    """All usable rows of the files, in order; unlabelled ones are counted in the log and left out.

    Raises:
        DataError: A line does not fit, or a file has no usable row.
    """
    rows: list[R] = []
    for path in paths:
        file = Path(path).name.partition(".")[0]
        found = [
            validate_row(model, {**fields, "file": file}, path=path, line=line) for line, fields in read_rows(path)
        ]
        usable = [row for row in found if not (isinstance(row, AnswerRow) and row.harmful is None)]
        if not usable:
            raise DataError("no usable row; each needs the fields of the format and a label", path=path)
        if len(usable) < len(found):
            logger.warning("%s: %d rows without a label are left out", path, len(found) - len(usable))
        rows += usable
    return rows


def licensed(rows: Sequence[R], pattern: str | None) -> list[R]:
    """The rows whose `extra.licence` matches the regular expression from its beginning; all if there is none.

    Raises:
        ConfigError: The expression is none, or no row is left.
    """
    if pattern is None:
        return list(rows)
    try:
        allowed = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"licences is no regular expression ({error}): {pattern!r}") from error
    kept = [row for row in rows if allowed.match(str(row.extra.get("licence", "")))]
    if not kept:
        raise ConfigError(f"none of {len(rows)} rows has an `extra.licence` that matches {pattern!r}")
    logger.info("%d of %d rows have a licence that the recipe takes", len(kept), len(rows))
    return kept


def choose(
    rows: Sequence[R], sources: dict[str, SourceRecipe], other: SourceRecipe, seed: int
) -> list[tuple[R, float]]:
    """The rows to train on with their loss weights, repeated as the recipe says, in random order.

    Raises:
        ConfigError: The recipe takes none of the rows.
    """
    rng = random.Random(seed)  # noqa: S311
    groups: dict[str, list[R]] = {}
    for row in rows:
        named = f"file:{row.file}"
        groups.setdefault(named if named in sources else row.group, []).append(row)
    chosen: list[tuple[R, float]] = []
    for group, members in sorted(groups.items()):
        use = sources.get(group) or sources.get(group.partition(":")[0]) or other
        drawn = members if use.rows is None else rng.sample(members, min(use.rows, len(members)))
        chosen += [(row, use.weight) for row in drawn for _ in range(use.repeat)]
    if not chosen:
        raise ConfigError(f"the recipe takes no row of these sources: {sorted(groups)}; change its sources")
    rng.shuffle(chosen)
    counts = Counter(f"{row.file} {row.group}" for row, _ in chosen)
    logger.info("training rows by source: %s", dict(counts.most_common()))
    return chosen
