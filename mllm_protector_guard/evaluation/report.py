"""Evaluations for people (a table) and for programs (plain values for JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mllm_protector_guard.evaluation.evaluate import RATES, Evaluation, macro_mean
from mllm_protector_guard.evaluation.metrics import Interval

__all__ = ["to_json", "to_table"]

_COUNTS = ("true_positives", "false_positives", "false_negatives", "true_negatives")
_HEADINGS = {"f1": "F1", "auroc": "AUROC", "fpr": "FPR"}


def to_json(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The evaluations as values that JSON holds; an undefined rate is None, never NaN."""
    return {
        "files": [_file_to_json(evaluation) for evaluation in evaluations],
        "mean": macro_mean(evaluations),
    }


def _file_to_json(evaluation: Evaluation) -> dict[str, Any]:
    metrics = evaluation.metrics
    return {
        "name": evaluation.name,
        "threshold": evaluation.threshold,
        "rows": evaluation.rows,
        "harmful": metrics.harmful,
        "harmless": metrics.harmless,
        "unlabelled": evaluation.unlabelled,
        "failed": evaluation.failed,
        "malformed": evaluation.malformed,
        **{count: getattr(metrics, count) for count in _COUNTS},
        **{rate: getattr(metrics, rate) for rate in RATES},
        "intervals": {rate: [interval.low, interval.high] for rate, interval in metrics.intervals.items()},
    }


def to_table(evaluations: Sequence[Evaluation]) -> Table:
    """One row a file, each rate over its 95 % interval, and the mean of the files below."""
    threshold = evaluations[0].threshold if evaluations else 0.5
    table = Table(caption=f"harmful = positive, threshold {threshold:.4g}; below each rate its 95 % interval")
    table.add_column("file", overflow="fold")
    for heading in ("rows", "harmful"):
        table.add_column(heading, justify="right", no_wrap=True)
    if left_out := [name for name in ("unlabelled", "failed", "malformed") if _total(evaluations, name)]:
        for heading in left_out:
            table.add_column(heading, justify="right", no_wrap=True, style="yellow")
    for rate in RATES:
        table.add_column(_HEADINGS.get(rate, rate), justify="right", no_wrap=True)
    for evaluation in evaluations:
        metrics = evaluation.metrics
        table.add_row(
            Text(evaluation.name),
            f"{evaluation.rows:,}",
            f"{metrics.harmful:,}",
            *(f"{getattr(evaluation, name):,}" for name in left_out),
            *(_rate(getattr(metrics, rate), metrics.intervals.get(rate)) for rate in RATES),
        )
    if len(evaluations) > 1:
        table.add_section()
        blanks = [""] * len(left_out)
        means = macro_mean(evaluations)
        rates = (_rate(means[rate], None) for rate in RATES)
        table.add_row("mean of files", f"{_total(evaluations, 'rows'):,}", "", *blanks, *rates)
    return table


def _total(evaluations: Sequence[Evaluation], count: str) -> int:
    return sum(getattr(evaluation, count) for evaluation in evaluations)


def _rate(value: float | None, interval: Interval | None) -> Text:
    if value is None:
        return Text("")
    text = Text(f"{value:.3f}")
    if interval is not None:
        text.append(f"\n{interval.low:.2f}–{interval.high:.2f}", style="dim")
    return text
