"""Finds what spoils training files: bad rows, repeated rows, contradicting labels, leaks, answers told by length.

Every row is one turn (detector rows) or two (triples: the rejected answer, which counts as harmful, and the accepted
one). Two turns are near when their questions are and their answers are; see `shingles`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import StrictBool

from mllm_protector_guard.errors import ConfigError, DataError
from mllm_protector_guard.jsonl import Row, read_rows, validate_row
from mllm_protector_guard.training.findings import CheckReport, FileSummary, Finding, Place, RowKind
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow
from mllm_protector_guard.training.shingles import Parts, Shingles, leaders, shingles

__all__ = ["check_files"]

_LONG_RATIO = 4
_LONG_CHARS = 400
"""An accepted answer is much longer than the rejected one from this ratio and this length on."""
_LENGTH_ROWS = 20
"""Answers of each label without which their lengths say nothing."""
_NO_QUESTION: Shingles = np.zeros(1, np.uint32)
"""Stands for an unknown question, which is near to nothing but another unknown one."""
_SPOILT = {"malformed", "blank", "unchanged", "leak", "conflict", "near_conflict", "overlap", "duplicate"} | {
    "near_duplicate"
}
"""Findings whose rows a clean file lacks."""


class _AnswerFields(AnswerRow):
    harmful: StrictBool | None


@dataclass(frozen=True, slots=True)
class _CheckedRow:
    """A usable row: where it is, its turns by number, and the label of each."""

    place: Place
    kind: RowKind
    turns: tuple[int, ...]
    labels: tuple[bool | None, ...]


def check_files(
    paths: Sequence[Path],
    *,
    against: Sequence[Path] = (),
    kind: RowKind | None = None,
    similarity: float = 0.8,
    max_length_auroc: float = 0.7,
    on_rows: Callable[[int], None] = lambda count: None,
) -> CheckReport:
    """Reads the files and reports what was found.

    Args:
        paths: Files of detector rows or triples.
        against: Files, of either kind, whose turns must not be in `paths`.
        kind: Of all rows; None goes by the fields of each file's first row.
        similarity: Jaccard index of the shingles from which two texts are near, in [0.5, 1].
        max_length_auroc: Highest AUROC of the answer's length alone, either way round, that is no finding; [0.5, 1].
        on_rows: Told the number of rows read so far, now and then.

    Raises:
        ConfigError: A file is named twice.
        OSError: A file cannot be read.
    """
    everything = [*paths, *against]
    if len({path.resolve() for path in everything}) < len(everything):
        raise ConfigError("a file is named twice, or is also in --against; name each once")
    reader = _Reader(kind, on_rows)
    hidden = [reader.read(path) for path in against]  # first, so that they lead their groups
    seen = len(reader.turns)
    # What cannot be read of these files could leak unseen, and so is a finding; their other faults are not.
    unread = [finding for finding in reader.findings if finding.kind == "malformed"]
    evaluation, reader.rows, reader.findings = reader.rows, [], unread
    files = [reader.read(path) for path in paths]
    groups = leaders(reader.turns, similarity, always_lead=seen)
    findings = [*reader.findings, *_compare(reader.rows, groups, evaluation)]
    findings += [found for one in files if (found := _length_leak(one, max_length_auroc))]
    left_out: defaultdict[Path, dict[int, str]] = defaultdict(dict)
    for finding in findings:
        if finding.kind in _SPOILT and finding.place.line is not None:
            left_out[finding.place.path].setdefault(finding.place.line, finding.kind)
    for place, reason in _contradicted(reader.rows, groups, findings):
        left_out[place.path].setdefault(place.line or 0, reason)
    order = {path: number for number, path in enumerate(everything)}
    findings.sort(key=lambda finding: (order[finding.place.path], finding.place.line or 0))
    return CheckReport(files=files, against=hidden, findings=findings, left_out=dict(left_out))


class _Reader:
    """Reads files row by row and keeps of each text its shingles alone."""

    def __init__(self, kind: RowKind | None, on_rows: Callable[[int], None]) -> None:
        self.rows: list[_CheckedRow] = []
        self.turns: list[Parts] = []
        self.findings: list[Finding] = []
        self._kind = kind
        self._on_rows = on_rows
        self._count = 0
        self._numbers: dict[bytes, int] = {}
        self._shingles = shingles()

    def read(self, path: Path) -> FileSummary:
        summary = FileSummary(path=path, kind=self._kind)
        for line, fields in self._lines(summary):
            self._count += 1
            if self._count % 1000 == 0:
                self._on_rows(self._count)
            kind = summary.kind or _kind_of(fields)
            model: type[AnswerRow] | type[RewriteRow] = RewriteRow if kind == "triples" else _AnswerFields
            try:
                row = validate_row(model, fields, path=path, line=line)
            except DataError as error:
                self._note_bad(summary, error)
            else:
                summary.kind = kind
                self._take(row, fields, Place(path, line), summary)
        if not summary.rows:
            self._find("malformed", Place(path, None), detail="the file has no usable row")
        summary.length_auroc = _auroc(summary.lengths[True], summary.lengths[False])
        return summary

    def _lines(self, summary: FileSummary) -> Iterator[Row]:
        try:
            yield from read_rows(summary.path, on_bad_line=lambda error: self._note_bad(summary, error))
        except DataError as error:  # the file is cut off
            self._note_bad(summary, error)

    def _note_bad(self, summary: FileSummary, error: DataError) -> None:
        summary.malformed += 1
        place = Place(summary.path, error.line)
        self._find("malformed", place, detail=str(error).removeprefix(f"{place}: "))

    def _find(self, kind: str, place: Place, *, detail: str = "") -> None:
        self.findings.append(Finding(kind=kind, place=place, detail=detail))

    def _take(self, row: AnswerRow | RewriteRow, fields: Mapping[str, Any], place: Place, summary: FileSummary) -> None:
        answers = _answers(row)
        self._look_at(row, fields, place)
        summary.rows += 1
        summary.unknown_questions += row.question is None
        for label, answer in answers:
            summary.lengths[label].append(len(answer))
        for name, counts in (("lang", summary.languages), ("licence", summary.licences)):
            if isinstance(value := row.extra.get(name), str):
                counts[value] += 1
        kind: RowKind = "triples" if isinstance(row, RewriteRow) else "detector"
        numbers = tuple(self._number(row.question, answer) for _, answer in answers)
        self.rows.append(_CheckedRow(place, kind, numbers, tuple(label for label, _ in answers)))

    def _look_at(self, row: AnswerRow | RewriteRow, fields: Mapping[str, Any], place: Place) -> None:
        unknown = sorted(fields.keys() - (type(row).model_fields.keys() - {"file"}))
        if unknown:
            self._find("unknown_field", place, detail=", ".join(map(repr, unknown)))
        names = ("question", "answer", "rejected", "accepted")
        blank = [name for name in names if (text := getattr(row, name, None)) is not None and not text.strip()]
        if blank:
            self._find("blank", place, detail=", ".join(blank))
        if isinstance(row, RewriteRow):
            before, after = len(row.rejected), len(row.accepted)
            if row.rejected.strip() == row.accepted.strip():
                self._find("unchanged", place)
            elif after >= max(_LONG_RATIO * before, _LONG_CHARS):
                self._find("long_accepted", place, detail=f"{after:,} characters after {before:,}")

    def _number(self, question: str | None, answer: str) -> int:
        # repr tells an unknown question from the question "None", and any text can be encoded.
        key = hashlib.blake2b(repr((question, answer)).encode(), digest_size=16).digest()
        number = self._numbers.setdefault(key, len(self.turns))
        if number == len(self.turns):
            asked = _NO_QUESTION if question is None else self._shingles(question)
            self.turns.append((asked, self._shingles(answer)))
        return number


def _kind_of(fields: Mapping[str, Any]) -> RowKind:
    return "triples" if fields.keys() & {"rejected", "accepted"} else "detector"


def _answers(row: AnswerRow | RewriteRow) -> list[tuple[bool | None, str]]:
    if isinstance(row, RewriteRow):
        return [(True, row.rejected), (False, row.accepted)]
    return [(row.harmful, row.answer)]


def _compare(rows: Sequence[_CheckedRow], groups: Sequence[int], evaluation: Sequence[_CheckedRow]) -> list[Finding]:
    """Leaks, conflicts and repetitions, in this order of importance: a row has one of them at most."""
    hidden: dict[int, Place] = {}
    for row in evaluation:
        for turn in row.turns:
            hidden.setdefault(turn, row.place)
    exact, near = _Ledger(), _Ledger()
    findings = []
    for row in rows:
        near_turns = tuple(groups[turn] for turn in row.turns)
        leak = next((hidden[turn] for turn in near_turns if turn in hidden), None)
        conflict, near_conflict = exact.conflict(row, row.turns), near.conflict(row, near_turns)
        repeated, near_repeated = exact.repeated(row, row.turns), near.repeated(row, near_turns)
        candidates = (
            ("leak", leak),
            ("conflict", conflict),
            ("near_conflict", near_conflict),
            (_repetition("duplicate", row, repeated), repeated),
            (_repetition("near_duplicate", row, near_repeated), near_repeated),
        )
        found = next(((kind, other) for kind, other in candidates if other is not None), None)
        if found is not None:
            findings.append(Finding(kind=found[0], place=row.place, other=found[1]))
    return findings


def _repetition(kind: str, row: _CheckedRow, other: Place | None) -> str:
    return "overlap" if other is not None and other.path != row.place.path else kind


class _Ledger:
    """The first row of each kind that had certain turns."""

    def __init__(self) -> None:
        self._rows: dict[tuple[Any, ...], Place] = {}
        self._labels: dict[tuple[RowKind, int, bool], Place] = {}

    def repeated(self, row: _CheckedRow, turns: tuple[int, ...]) -> Place | None:
        """The earlier row with the same turns and labels, if there is one."""
        first = self._rows.setdefault((row.kind, turns, row.labels), row.place)
        return None if first == row.place else first

    def conflict(self, row: _CheckedRow, turns: tuple[int, ...]) -> Place | None:
        """An earlier row that has one of the turns with the other label, if there is one."""
        found = None
        for turn, label in zip(turns, row.labels, strict=True):
            if label is not None:
                found = found or self._labels.get((row.kind, turn, not label))
        for turn, label in zip(turns, row.labels, strict=True):
            if label is not None:
                self._labels.setdefault((row.kind, turn, label), row.place)
        return found


def _contradicted(
    rows: Sequence[_CheckedRow], groups: Sequence[int], findings: Sequence[Finding]
) -> Iterator[tuple[Place, str]]:
    """All rows of groups in which labels contradict each other: nobody knows which of them is right."""
    named = {finding.place for finding in findings if finding.kind in ("conflict", "near_conflict")}
    named |= {finding.other for finding in findings if finding.kind in ("conflict", "near_conflict") and finding.other}
    keyed = [(row, {(row.kind, groups[turn]) for turn in row.turns}) for row in rows]
    labels: defaultdict[tuple[RowKind, int], set[bool | None]] = defaultdict(set)
    for row, _ in keyed:
        for turn, label in zip(row.turns, row.labels, strict=True):
            labels[row.kind, groups[turn]].add(label)
    spoilt = {key for row, keys in keyed if row.place in named for key in keys if {True, False} <= labels[key]}
    for row, keys in keyed:
        if keys & spoilt:
            yield row.place, "conflict"


def _length_leak(one: FileSummary, limit: float) -> Finding | None:
    if min(len(one.lengths[True]), len(one.lengths[False])) < _LENGTH_ROWS or one.length_auroc is None:
        return None
    if max(one.length_auroc, 1 - one.length_auroc) <= limit:
        return None
    longer = "harmful" if one.length_auroc > 0.5 else "harmless"
    detail = f"AUROC {one.length_auroc:.3f}, {longer} answers are the longer ones"
    return Finding(kind="length_leak", place=Place(one.path, None), detail=detail)


def _auroc(harmful: Sequence[int], harmless: Sequence[int]) -> float | None:
    if not harmful or not harmless:
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([True] * len(harmful) + [False] * len(harmless), [*harmful, *harmless]))
