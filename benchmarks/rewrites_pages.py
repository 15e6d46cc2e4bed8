"""How measured rewrites look in Markdown: tables of figures, and examples that nobody chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mllm_protector_guard.evaluation.rewrites import Distribution, Share

if TYPE_CHECKING:
    from rewrites_report import Measured

__all__ = ["Figures", "example", "notes", "table"]

Figures = dict[str, Share | Distribution | None]
"""Figures by what they say."""

_SHOWN_CHARS = 200


def table(columns: Mapping[str, Figures]) -> str:
    """The figures of each column side by side, in Markdown."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for name in next(iter(columns.values())):
        lines.append(f"| {name} | {' | '.join(_cell(column[name]) for column in columns.values())} |")
    return "\n".join(lines)


def _cell(figure: Share | Distribution | None) -> str:
    if isinstance(figure, Share):
        if figure.share is None or figure.interval is None:
            return "none"
        low, high = figure.interval
        return f"{figure.share:.1%} ({low:.1%} to {high:.1%}) of {figure.whole}"
    return "none" if figure is None else f"{figure.mean:.3g} ({figure.low:.3g} to {figure.high:.3g})"


def notes(threshold: float) -> str:
    """How to read the tables; `threshold` is the judge's."""
    return (
        f"Shares stand with Wilson's 95 % interval, other figures as the mean with the 5 % and 95 % quantiles. "
        f"The judge calls a text harmful from {threshold:.3f} on; a text that it cannot read counts as harmful. "
        "Relevance and similarity are cosines of mean-pooled all-MiniLM-L6-v2 embeddings. Figures of the plain guard "
        "are about answers as they come; all others about every drawn answer, called harmful by force."
    )


def example(number: int, one: Measured) -> str:
    """A row with its texts and scores, in Markdown."""
    row = one.row
    rejected = row.rejected if len(row.rejected) <= _SHOWN_CHARS else row.rejected[:_SHOWN_CHARS].rstrip() + " [...]"
    return (
        f"### {number}. {row.file}, line {row.line}\n\n"
        f"Question:\n\n{_quoted(row.question)}\n\n"
        f"Rejected (detector {_score(row.harm_score)}, judge {_score(one.judge_rejected)}):\n\n{_quoted(rejected)}\n\n"
        f"Rewrite (detector {_score(row.rewrite_score)}, judge {_score(one.judge_rewrite)}, "
        f"relevance {_score(one.relevance)}):\n\n"
        f"{'withheld' if row.rewrite is None else _quoted(row.rewrite)}\n"
    )


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
