"""Our F1 beside the published ones, where the rows are those of a public benchmark.

The figures of others are in `published.json`, with their source. They were measured on the whole official tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from mllm_protector_guard.evaluation.metrics import Interval, measure
from mllm_protector_guard.evaluation.slices import ScoredRow

__all__ = ["Benchmark", "BenchmarkFigure", "Published", "PublishedModel", "compare", "mean_f1", "published"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Benchmark(_Strict):
    """A public test of answers.

    Attributes:
        name: `source` of its rows, or how the name of a file of rows without a source begins.
        title: What people call it.
        official_rows: Rows of the whole test.
    """

    name: str
    title: str
    official_rows: int


class PublishedModel(_Strict):
    """What others report of a model.

    Attributes:
        model: Its name.
        size: Its parameters.
        f1: In percent, by name of the benchmark.
        mean: Of the four, in percent, as published.
        source: Where the figures stand.
    """

    model: str
    size: str
    f1: dict[str, float]
    mean: float
    source: str


class Published(_Strict):
    """The content of `published.json`.

    Attributes:
        measure: What the figures are.
        benchmarks: In the order of the table.
        models: Best mean first.
    """

    measure: str
    benchmarks: list[Benchmark]
    models: list[PublishedModel]


class BenchmarkFigure(_Strict):
    """Our F1 on the rows of a benchmark.

    Attributes:
        benchmark: Its name.
        rows: Rows that were measured.
        official_rows: Rows of the whole test; with fewer of them, ours is the figure of a subset.
        f1: [0, 1]; None if the rows do not define it.
        interval: 95 %, by bootstrap.
    """

    benchmark: str
    rows: int
    official_rows: int
    f1: float | None
    interval: Interval | None


@cache
def published() -> Published:
    """The published figures."""
    return Published.model_validate_json(files(__package__).joinpath("published.json").read_bytes())


def compare(sets: Iterable[tuple[str, Sequence[ScoredRow]]], *, threshold: float) -> tuple[BenchmarkFigure, ...]:
    """Our figures on those benchmarks that have rows in the sets, given by name and rows."""
    found: dict[str, list[tuple[bool, float]]] = {}
    for set_name, rows in sets:
        for row in rows:
            name = _benchmark_of(row, set_name)
            if name is not None and row.harmful is not None and row.harm_score is not None:
                found.setdefault(name, []).append((row.harmful, row.harm_score))
    figures = []
    for benchmark in published().benchmarks:
        if pairs := found.get(benchmark.name):
            metrics = measure([label for label, _ in pairs], [score for _, score in pairs], threshold=threshold)
            figures.append(
                BenchmarkFigure(
                    benchmark=benchmark.name,
                    rows=len(pairs),
                    official_rows=benchmark.official_rows,
                    f1=metrics.f1,
                    interval=metrics.intervals.get("f1"),
                )
            )
    return tuple(figures)


def mean_f1(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there; None without any."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _benchmark_of(row: ScoredRow, set_name: str) -> str | None:
    for benchmark in published().benchmarks:
        if row.source == benchmark.name or (row.source is None and set_name.startswith(benchmark.name)):
            return benchmark.name
    return None
