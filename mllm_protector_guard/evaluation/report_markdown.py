"""Reports as Markdown: a whole one, and the section of figures of a model card."""

from __future__ import annotations

from collections.abc import Iterable

from mllm_protector_guard.evaluation.report_json import ModelReport, Report
from mllm_protector_guard.evaluation.report_tables import (
    Cell,
    Table,
    buried_table,
    comparison_table,
    files_table,
    latency_table,
    model_tables,
    perturbed_table,
    published_table,
    slice_tables,
)

__all__ = ["card_section", "to_markdown"]


def to_markdown(report: Report) -> str:
    """The whole report as a page of Markdown."""
    tables = [comparison_table(report)] if len(report.models) > 1 else []
    tables += [files_table(model) for model in report.models]
    tables += model_tables(report)
    for model in report.models:
        tables += slice_tables(model)
    return f"# Evaluation\n\n{_measured_with(report.version)}\n\n{_sections(tables, level=2)}"


def card_section(model: ModelReport, version: str) -> str:
    """The figures of one model for its card: headings of the third level."""
    report = Report(version=version, models=[model])
    tables = [
        files_table(model), published_table(report), *slice_tables(model), perturbed_table(report),
        buried_table(report), latency_table(report),
    ]  # fmt: skip
    return f"{_measured_with(version)} The section is generated; do not edit it.\n\n{_sections(tables, level=3)}"


def _measured_with(version: str) -> str:
    return f"Measured with `mllm-protector evaluate`, version {version}."


def _sections(tables: Iterable[Table | None], *, level: int) -> str:
    return "\n".join(
        f"{'#' * level} {_escaped(table.title)}\n\n{_drawn(table)}\n\n{table.sentence}\n"
        for table in tables
        if table is not None
    )


def _drawn(table: Table) -> str:
    rule = ["---" if number < table.texts else "--:" for number in range(len(table.headings))]
    rows = [_row(map(_escaped, table.headings)), _row(rule)]
    rows += [_row(map(_cell, row)) for group in table.groups for row in group]
    return "\n".join(rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = _escaped(cell.text)
    if cell.strong and text:
        text = f"**{text}**"
    return f"{text} ({_escaped(cell.detail)})" if cell.detail else text


def _escaped(text: str) -> str:
    """The text as Markdown shows it literally; names of files and models hold all kinds of characters."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
