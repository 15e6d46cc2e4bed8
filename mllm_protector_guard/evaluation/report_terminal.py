"""Reports for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from mllm_protector_guard.evaluation.report_json import Report
from mllm_protector_guard.evaluation.report_tables import (
    Cell,
    Table,
    buried_table,
    comparison_table,
    files_table,
    latency_table,
    perturbed_table,
    published_table,
    slice_tables,
)

__all__ = ["to_terminal"]


def to_terminal(report: Report, *, slices: bool = False) -> Iterator[RichTable]:
    """The tables of a report; those of its parts only if asked for."""
    for model in report.models:
        yield _drawn(files_table(model))
        if slices:
            yield from map(_drawn, slice_tables(model))
    if len(report.models) > 1:
        yield _drawn(comparison_table(report))
    for table in (perturbed_table(report), buried_table(report), published_table(report), latency_table(report)):
        if table is not None:
            yield _drawn(table)


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(
        title=table.title, caption=table.note, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left",
        title_style="bold", padding=(0, 1, 0, 0),
    )  # fmt: skip
    for number, heading in enumerate(table.headings):
        if number < table.texts:
            drawn.add_column(heading, overflow="fold")
        else:
            drawn.add_column(heading, justify="right", overflow="fold", min_width=_widest(table, number))
    for group in table.groups:
        for row in group:
            drawn.add_row(*map(_text, row))
        drawn.add_section()
    return drawn


def _widest(table: Table, column: int) -> int:
    cells = (row[column] for group in table.groups for row in group)
    return max((max(len(cell.text), len(cell.detail)) for cell in cells), default=0)


def _text(cell: Cell) -> Text:
    text = Text(cell.text, style="bold" if cell.strong else "")
    if cell.detail:
        text.append(f"\n{cell.detail}", style="dim not bold")
    return text
