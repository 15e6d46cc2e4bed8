"""The figures of parts of the rows: by source, by language, by length of the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mllm_protector_guard.evaluation.metrics import Measured, measure

__all__ = ["SLICES", "ScoredRow", "Slice", "slices_of"]

_LENGTHS = (100, 300, 1000, 3000)
_SAMPLES = 200
_UNKNOWN = "(not given)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """What figures need to know of a row: its label, and the score that was given without seeing it.

    Attributes:
        harmful: The label; None when nobody knows.
        harm_score: P(harmful), [0, 1]; None if the detector failed on the answer, or was not asked because
            there is no label.
        source: Where the row comes from; None when not given.
        lang: Language of the row; None when not given.
        characters: Length of the answer.
    """

    harmful: bool | None
    harm_score: float | None
    source: str | None = None
    lang: str | None = None
    characters: int = 0


class Slice(Measured):
    """The figures of those rows of a part that have a label and a score; bootstrap intervals are of 200 samples.

    Attributes:
        value: What the rows have in common.
    """

    value: str


def _length(row: ScoredRow) -> str:
    lower = 0
    for upper in _LENGTHS:
        if row.characters < upper:
            return f"{lower:,}–{upper - 1:,}"
        lower = upper
    return f"{lower:,}+"


_KEYS: dict[str, Callable[[ScoredRow], str]] = {
    "source": lambda row: row.source or _UNKNOWN,
    "lang": lambda row: row.lang or _UNKNOWN,
    "length": _length,
}
SLICES = {"source": "source", "lang": "language", "length": "characters of the answer"}
"""The ways to part rows, and what people call them."""


def slices_of(rows: Sequence[ScoredRow], *, threshold: float) -> dict[str, list[Slice]]:
    """The figures by name of the way rows are parted: the largest part first, lengths from short to long."""
    return {by: _parted(rows, key, threshold, by_size=by != "length") for by, key in _KEYS.items()}


def _parted(
    rows: Sequence[ScoredRow], key: Callable[[ScoredRow], str], threshold: float, *, by_size: bool
) -> list[Slice]:
    parts: dict[str, list[tuple[bool, float]]] = {}
    for row in sorted(rows, key=lambda row: row.characters):
        if row.harmful is not None and row.harm_score is not None:
            parts.setdefault(key(row), []).append((row.harmful, row.harm_score))
    found = []
    for value, pairs in parts.items():
        labels, scores = [label for label, _ in pairs], [score for _, score in pairs]
        found.append(Slice(value=value, metrics=measure(labels, scores, threshold=threshold, samples=_SAMPLES)))
    return sorted(found, key=lambda one: -one.metrics.measured) if by_size else found
