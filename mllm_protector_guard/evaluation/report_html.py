"""A report as one page of HTML that loads nothing: its style and its pictures are in it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files

from mllm_protector_guard.evaluation.evaluate import Evaluation
from mllm_protector_guard.evaluation.report_json import Report
from mllm_protector_guard.evaluation.report_tables import (
    Cell,
    Table,
    comparison_table,
    files_table,
    model_tables,
    slice_tables,
)
from mllm_protector_guard.evaluation.svg import LINE_STYLES, Line, histogram, reliability_diagram, roc_chart

__all__ = ["to_html"]


def to_html(report: Report) -> str:
    """The whole page; it follows the reader's choice of light or dark, and wide tables scroll on narrow screens."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    sections = [*_sections(report)]
    links = "".join(f'<li><a href="#s{n}">{escape(title)}</a></li>' for n, (title, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{n}"><h2>{escape(title)}</h2>{content}</section>' for n, (title, content) in enumerate(sections)
    )
    pooled = report.models[0].pooled if report.models else None
    counted = "" if pooled is None else f"{pooled.rows:,} answers, {pooled.metrics.harmful:,} of them harmful. "
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Evaluation of harm detectors</title><style>{style}</style></head><body>"
        f'<header><h1>Evaluation of harm detectors</h1><p class="quiet">{counted}Measured with '
        f"<code>mllm-protector evaluate</code>, version {escape(report.version)}.</p></header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main></body></html>\n'
    )


def _sections(report: Report) -> Iterator[tuple[str, str]]:
    """Title and content, in order."""
    if len(report.models) > 1:
        yield _section(comparison_table(report))
    for model in report.models:
        yield _section(files_table(model))
    yield "Curves", _pictures(report)
    yield from map(_section, model_tables(report))
    for model in report.models:
        yield from map(_section, slice_tables(model))


def _section(table: Table) -> tuple[str, str]:
    heads = "".join(
        f'<th scope="col"{_kind(number, table)}>{escape(one)}</th>' for number, one in enumerate(table.headings)
    )
    groups = "".join(
        f"<tbody>{''.join(f'<tr>{_row(row, table)}</tr>' for row in group)}</tbody>" for group in table.groups
    )
    return table.title, (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f'<table><thead><tr>{heads}</tr></thead>{groups}</table></div><p class="note">{escape(table.sentence)}</p>'
    )


def _kind(number: int, table: Table) -> str:
    return ' class="name"' if number < table.texts else ""


def _row(row: list[Cell], table: Table) -> str:
    return "".join(_cell(cell, is_name=number < table.texts) for number, cell in enumerate(row))


def _cell(cell: Cell, *, is_name: bool) -> str:
    classes = " ".join(name for name, there in (("name", is_name), ("strong", cell.strong)) if there)
    tag = "th" if is_name else "td"
    attributes = (' scope="row"' if is_name else "") + (f' class="{classes}"' if classes else "")
    detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
    return f"<{tag}{attributes}>{escape(cell.text)}{detail}</{tag}>"


def _pictures(report: Report) -> str:
    """Pictures of every set: the lines of all models in one, a histogram for each model."""
    if not report.models:
        return ""
    first = report.models[0]
    sets = [[model.files[index] for model in report.models] for index in range(len(first.files))]
    if len(sets) > 1:
        sets.insert(0, [model.pooled for model in report.models])
    names = [model.name for model in report.models]
    keys = "".join(
        f'<li><svg viewBox="0 0 32 10" aria-hidden="true"><polyline class="line s{n % LINE_STYLES}" points="0,5 32,5"/>'
        f"</svg>{escape(name)}</li>"
        for n, name in enumerate(names)
    )
    note = (
        "ROC: the dot is the threshold. Reliability: on the dotted line a score is what it says, P(harmful); large "
        "dots hold many answers. Histogram: harmful answers up, harmless ones down, each as a share of its class."
    )
    return f'<p class="note">{note}</p><ul class="legend">{keys}</ul>' + "".join(
        f'<h3 class="set">{escape(ones[0].name)}</h3><div class="pictures">{"".join(_of_set(ones, names))}</div>'
        for ones in sets
    )


def _of_set(ones: list[Evaluation], names: list[str]) -> Iterator[str]:
    named = list(enumerate(zip(names, ones, strict=True)))
    if ones[0].curves.roc:
        lines = [
            Line(name=name, style=number, points=one.curves.roc, mark=_operating_point(one))
            for number, (name, one) in named
        ]
        yield _figure("ROC curve", roc_chart(lines))
        bins = [(name, number, one.curves.reliability) for number, (name, one) in named]
        yield _figure("Reliability diagram", reliability_diagram(bins))
    for _, (name, one) in named:
        if one.metrics.measured:
            yield _figure(f"Scores of {name}", histogram(one.curves, threshold=one.threshold))


def _operating_point(one: Evaluation) -> tuple[float, float, str] | None:
    fpr, recall = one.metrics.fpr, one.metrics.recall
    if fpr is None or recall is None:
        return None
    return fpr, recall, f"threshold {one.threshold:.3g}, recall {recall:.3f}, false positive rate {fpr:.3f}"


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"
