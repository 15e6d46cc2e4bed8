"""What the check of training files found: as values, as tables for people, and for JSON. None holds a text of a row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["FINDING_KINDS", "CheckReport", "FileSummary", "Finding", "Place", "RowKind", "to_json", "to_tables"]

RowKind = Literal["detector", "triples"]

FINDING_KINDS = {
    "malformed": "the line is no row of the format",
    "unknown_field": "a field that training does not read; put it into `extra`",
    "blank": "an empty text, or white space alone",
    "unchanged": "`accepted` is the same text as `rejected`",
    "long_accepted": "`accepted` is much longer than `rejected`",
    "leak": "nearly the same question and answer in a file of --against",
    "conflict": "the same question and answer with the other label",
    "near_conflict": "nearly the same question and answer with the other label",
    "overlap": "the same or nearly the same row in an earlier file",
    "duplicate": "the same row earlier in the file",
    "near_duplicate": "nearly the same row earlier in the file",
    "length_leak": "length alone tells the labels apart",
}
"""Every kind of finding, with what it says."""

_SHOWN_VALUES = 8
"""Languages or licences in the table; JSON has all of them."""


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, counted from 1; None for the whole file."""

    path: Path
    line: int | None

    def __str__(self) -> str:
        return f"{self.path}" if self.line is None else f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: A key of `FINDING_KINDS`.
        place: Where.
        other: The row that it is a duplicate of, in conflict with, and so on.
        detail: More about it, never a text of the row.
    """

    kind: str
    place: Place
    other: Place | None = None
    detail: str = ""


@dataclass(slots=True, kw_only=True)
class FileSummary:
    """What a file holds.

    Attributes:
        lengths: Characters of each answer by label: harmful, harmless, unlabelled. For triples, rejected and accepted
            stand for the first two.
        length_auroc: Chance that a harmful answer is longer than a harmless one; None without both.
        unknown_questions: Rows without a question.
        languages: Rows by `extra.lang`.
        licences: Rows by `extra.licence`.
    """

    path: Path
    kind: RowKind | None = None
    rows: int = 0
    malformed: int = 0
    unknown_questions: int = 0
    lengths: defaultdict[bool | None, list[int]] = field(default_factory=lambda: defaultdict(list))
    length_auroc: float | None = None
    languages: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)

    def median_length(self, label: bool) -> float | None:
        """Median characters of the answers with this label; None if there are none."""
        return median(self.lengths[label]) if self.lengths[label] else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """All that was found.

    Attributes:
        files: The checked files, in order.
        against: The files that must not leak, in order.
        findings: By file and line.
        left_out: By file the lines that a clean file lacks, with the kind of the finding that is the reason.
    """

    files: list[FileSummary]
    against: list[FileSummary]
    findings: list[Finding]
    left_out: dict[Path, dict[int, str]]

    @property
    def counts(self) -> Counter[str]:
        """Findings by kind."""
        return Counter(finding.kind for finding in self.findings)

    @property
    def shared(self) -> Counter[tuple[Path, Path]]:
        """Rows of the first file that are also in the second, for each pair of files that shares any."""
        pairs = ((f.place.path, f.other.path) for f in self.findings if f.other and f.kind in ("overlap", "leak"))
        return Counter(pairs)

    def first(self, count: int) -> Iterator[Finding]:
        """At most `count` findings of each kind."""
        seen: Counter[str] = Counter()
        for finding in self.findings:
            seen[finding.kind] += 1
            if seen[finding.kind] <= count:
                yield finding


def to_json(report: CheckReport, *, max_findings: int) -> dict[str, Any]:
    """The report as values that JSON holds, with at most `max_findings` findings of each kind."""
    shown = list(report.first(max_findings))
    return {
        "files": [_file_to_json(one) for one in report.files],
        "against": [_file_to_json(one) for one in report.against],
        "counts": {kind: report.counts[kind] for kind in FINDING_KINDS if report.counts[kind]},
        "shared": [{"file": str(a), "with": str(b), "rows": n} for (a, b), n in sorted(report.shared.items())],
        "findings": [_finding_to_json(finding) for finding in shown],
        "findings_not_shown": len(report.findings) - len(shown),
    }


def _finding_to_json(finding: Finding) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": finding.kind, "file": str(finding.place.path), "line": finding.place.line}
    if finding.other is not None:
        fields["other"] = {"file": str(finding.other.path), "line": finding.other.line}
    return {**fields, "detail": finding.detail} if finding.detail else fields


def _file_to_json(one: FileSummary) -> dict[str, Any]:
    return {
        "file": str(one.path),
        "kind": one.kind,
        "rows": one.rows,
        "malformed": one.malformed,
        "unknown_questions": one.unknown_questions,
        "harmful": len(one.lengths[True]),
        "harmless": len(one.lengths[False]),
        "unlabelled": len(one.lengths[None]),
        "median_chars_harmful": one.median_length(True),
        "median_chars_harmless": one.median_length(False),
        "length_auroc": one.length_auroc,
        "languages": dict(one.languages.most_common()),
        "licences": dict(one.licences.most_common()),
    }


def to_tables(report: CheckReport, *, max_findings: int) -> RenderableType:
    """The files, the findings by kind, and at most `max_findings` places of each kind."""
    parts: list[RenderableType] = [_file_table(report)]
    for title, name in (("languages", "languages"), ("licences", "licences")):
        total: Counter[str] = sum((getattr(one, name) for one in report.files), Counter())
        if total:
            parts.append(Text(f"{title}: {_most_common(total)}"))
    if report.findings:
        parts += [_kind_table(report), *(_line(finding) for finding in report.first(max_findings))]
        hidden = len(report.findings) - sum(1 for _ in report.first(max_findings))
        if hidden:
            parts.append(Text(f"and {hidden:,} more; --max-findings shows them"))
    parts += [Text(f"{a}: {n:,} rows are also in {b}") for (a, b), n in sorted(report.shared.items())]
    return Group(*parts)


def _file_table(report: CheckReport) -> Table:
    table = Table(caption="of triples, rejected counts as harmful and accepted as harmless; lengths in characters")
    table.add_column("file", overflow="fold")
    table.add_column("kind")
    for heading in ("rows", "harmful", "harmless", "no label", "median harmful", "median harmless", "length AUROC"):
        table.add_column(heading, justify="right")
    for one in [*report.files, *report.against]:
        counts = (one.rows, *(len(one.lengths[label]) for label in (True, False, None)))
        medians = (one.median_length(True), one.median_length(False))
        table.add_row(
            Text(str(one.path)),
            one.kind or "",
            *(f"{count:,}" for count in counts),
            *("" if value is None else f"{value:,.0f}" for value in medians),
            "" if one.length_auroc is None else f"{one.length_auroc:.3f}",
        )
    return table


def _kind_table(report: CheckReport) -> Table:
    table = Table()
    table.add_column("finding")
    table.add_column("count", justify="right")
    table.add_column("what it says")
    for kind, meaning in FINDING_KINDS.items():
        if report.counts[kind]:
            table.add_row(kind, f"{report.counts[kind]:,}", meaning)
    return table


def _line(finding: Finding) -> Text:
    other = f" (see {finding.other})" if finding.other else ""
    detail = f": {finding.detail}" if finding.detail else ""
    return Text(f"{finding.place}: {finding.kind}{other}{detail}")


def _most_common(counts: Counter[str]) -> str:
    shown = ", ".join(f"{value} {count:,}" for value, count in counts.most_common(_SHOWN_VALUES))
    more = len(counts) - _SHOWN_VALUES
    return f"{shown}, and {more:,} more in --json" if more > 0 else shown
