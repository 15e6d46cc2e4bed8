"""The tables of a report, as texts in cells; the terminal, Markdown and HTML only draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mllm_protector_guard.evaluation.evaluate import Evaluation
from mllm_protector_guard.evaluation.metrics import RATES, Interval, Metrics
from mllm_protector_guard.evaluation.published import mean_f1, published
from mllm_protector_guard.evaluation.report_json import ModelReport, Report
from mllm_protector_guard.evaluation.slices import SLICES

__all__ = [
    "Cell",
    "Table",
    "buried_table",
    "comparison_table",
    "files_table",
    "latency_table",
    "model_tables",
    "perturbed_table",
    "published_table",
    "slice_tables",
]

_HEADINGS = {"f1": "F1", "auroc": "AUROC", "auprc": "AUPRC", "fpr": "FPR", "recall_at_1pct_fpr": "R@1%", "ece": "ECE"}
_COMPARED = ("f1", "auroc", "recall", "fpr", "recall_at_1pct_fpr", "ece")
_LOWER_IS_BETTER = {"fpr", "ece"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell.

    Attributes:
        text: What it says.
        detail: The same in small print: an interval.
        strong: Whether it is to be seen first.
    """

    text: str
    detail: str = ""
    strong: bool = False


@dataclass(slots=True)
class Table:
    """A table; its first `texts` columns hold names and the others numbers.

    Attributes:
        title: What it shows.
        note: How to read it.
        headings: One a column.
        texts: Columns that hold names.
        groups: Rows that belong together, drawn with a line between the groups.
    """

    title: str
    note: str
    headings: Sequence[str]
    texts: int = 1
    groups: list[list[list[Cell]]] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """The note as a sentence."""
        return f"{self.note[:1].upper()}{self.note[1:].removesuffix('.')}."


def model_tables(report: Report) -> list[Table]:
    """Those that hold all models and are there: published figures, attacks, long answers, latency."""
    tables = (published_table(report), perturbed_table(report), buried_table(report), latency_table(report))
    return [table for table in tables if table is not None]


def files_table(model: ModelReport) -> Table:
    """One row a file, each rate over its 95 % interval; the mean of the files and all rows together below."""
    counts = ["rows", "harmful"]
    counts += [name for name in ("unlabelled", "failed", "malformed") if getattr(model.pooled, name)]
    table = Table(
        title=f"{model.name}: figures by file",
        note=(
            f"harmful = positive, threshold {model.threshold:.4g}; rates with their 95 % intervals; R@1% = highest "
            "recall at a false positive rate of at most 1 %; ECE in 15 bins of equal width"
        ),
        headings=["file", *counts, *map(heading, RATES)],
    )
    table.groups.append([_file_row(one, counts) for one in model.files])
    if len(model.files) > 1:
        mean = [Cell("mean of files"), *(Cell("") for _ in counts), *(Cell(_number(model.mean[r])) for r in RATES)]
        table.groups.append([mean, _file_row(model.pooled, counts)])
    return table


def heading(rate: str) -> str:
    """What people call a rate."""
    return _HEADINGS.get(rate, rate)


def _file_row(one: Evaluation, counts: Sequence[str]) -> list[Cell]:
    numbers = [one.metrics.harmful if name == "harmful" else getattr(one, name) for name in counts]
    return [Cell(one.name), *(Cell(f"{number:,}") for number in numbers), *_rates(one.metrics, RATES)]


def _rates(metrics: Metrics, rates: Sequence[str]) -> list[Cell]:
    return [rate_cell(getattr(metrics, rate), metrics.intervals.get(rate)) for rate in rates]


def rate_cell(value: float | None, interval: Interval | None = None, *, strong: bool = False) -> Cell:
    """A rate with its interval; empty if undefined."""
    if value is None:
        return Cell("")
    return Cell(_number(value), f"{interval.low:.2f}–{interval.high:.2f}" if interval else "", strong)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def comparison_table(report: Report) -> Table:
    """The models under each other for every file; the best of each file stands out."""
    table = Table(
        title="Models side by side",
        note="each model at its own threshold; the best figure of a file is marked, where models differ",
        headings=["file", "model", "threshold", *map(heading, _COMPARED)],
        texts=2,
    )
    for index, file in enumerate(report.models[0].files):
        _add_group(table, report, file.name, [model.files[index].metrics for model in report.models])
    if len(report.models[0].files) > 1:
        _add_group(table, report, "mean of files", [model.mean for model in report.models])
    return table


def _add_group(table: Table, report: Report, name: str, figures: Sequence[Metrics | dict[str, float | None]]) -> None:
    """Adds one row a model, given the figures of each."""
    plain = [one if isinstance(one, dict) else {rate: getattr(one, rate) for rate in _COMPARED} for one in figures]
    best = {}
    for rate in _COMPARED:
        values = [value for one in plain if (value := one[rate]) is not None]
        if len(set(values)) > 1:
            best[rate] = min(values) if rate in _LOWER_IS_BETTER else max(values)
    group = []
    for number, (model, one, rates) in enumerate(zip(report.models, figures, plain, strict=True)):
        intervals = {} if isinstance(one, dict) else one.intervals
        cells = [
            rate_cell(rates[rate], intervals.get(rate), strong=rate in best and rates[rate] == best[rate])
            for rate in _COMPARED
        ]
        group.append([Cell("" if number else name), Cell(model.name), Cell(f"{model.threshold:.3g}"), *cells])
    table.groups.append(group)


def slice_tables(model: ModelReport) -> list[Table]:
    """The parts of all rows, and of each file that has more than one part, by source, language and length."""
    sets = [*model.files, model.pooled] if len(model.files) > 1 else model.files
    tables = []
    for by, called in SLICES.items():
        groups = [
            [
                [Cell(one.name if number == 0 else ""), Cell(part.value), Cell(f"{part.metrics.measured:,}"),
                 Cell(f"{part.metrics.harmful:,}"), *_rates(part.metrics, RATES)]
                for number, part in enumerate(one.slices[by])
            ]
            for one in sets
            if len(one.slices[by]) > 1
        ]  # fmt: skip
        if groups:
            tables.append(
                Table(
                    title=f"{model.name}: by {called}",
                    note="sets with more than one part; a rate that the classes of a part do not define is empty",
                    headings=["set", called, "rows", "harmful", *map(heading, RATES)],
                    texts=2,
                    groups=groups,
                )
            )
    return tables


def latency_table(report: Report) -> Table | None:
    """Times of the models that scored anything in this run."""
    timed = [(model.name, model.latency) for model in report.models if model.latency is not None]
    if not timed:
        return None
    rows = [
        [
            Cell(name), Cell(one.device), Cell(f"{one.answers:,}"), Cell(f"{one.batched_p50_ms:.1f}"),
            Cell(f"{one.batched_p95_ms:.1f}"), Cell(f"{one.answers_per_s:.1f}"), Cell(f"{one.single_answers}"),
            Cell("" if one.single_p50_ms is None else f"{one.single_p50_ms:.1f}"),
            Cell("" if one.single_p95_ms is None else f"{one.single_p95_ms:.1f}"),
        ]
        for name, one in timed
    ]  # fmt: skip
    sizes = ", ".join(map(str, sorted({one.batch_size for _, one in timed})))
    return Table(
        title="Latency",
        note=(
            f"batched: the time of a batch of up to {sizes} answers, divided by its answers; single: a random sample "
            "of the answers, scored one a call. Not timed: loading, and answers with a score kept from an earlier run"
        ),
        headings=["model", "device", "answers", "batched p50, ms", "batched p95, ms", "answers a second",
                  "single answers", "single p50, ms", "single p95, ms"],
        texts=2,
        groups=[rows],
    )  # fmt: skip


def perturbed_table(report: Report) -> Table | None:
    """Each attack on each file: clean figures, and those on the attacked answers."""
    table = Table(
        title="Spelling attacks",
        note=(
            "clean → attacked on the same rows, at the same threshold; unchanged: answers that the attack cannot "
            "spell otherwise, which are measured too"
        ),
        headings=["model", "file", "attack", "rows", "unchanged", "AUROC", "AUROC drop", "recall", "FPR"],
        texts=3,
    )
    for model in report.models:
        for file in model.files:
            group = [
                [
                    Cell(model.name if number == 0 else ""), Cell(file.name if number == 0 else ""), Cell(one.kind),
                    Cell(f"{one.clean.measured:,}"), Cell(f"{one.unchanged:,}"),
                    *(_arrow(getattr(one.clean, rate), getattr(one.attacked, rate)) for rate in ("auroc",)),
                    Cell("" if one.auroc_drop is None else f"{one.auroc_drop:+.3f}"),
                    *(_arrow(getattr(one.clean, rate), getattr(one.attacked, rate)) for rate in ("recall", "fpr")),
                ]
                for number, one in enumerate(file.perturbed)
            ]  # fmt: skip
            if group:
                table.groups.append(group)
    return table if table.groups else None


def _arrow(before: float | None, after: float | None) -> Cell:
    return Cell("" if before is None or after is None else f"{before:.3f} → {after:.3f}")


def buried_table(report: Report) -> Table | None:
    """Long answers with one harmful paragraph, and without it."""
    rows = [
        [
            Cell(model.name), Cell(file.name), Cell(f"{one.metrics.harmful:,}"), Cell(f"{one.mean_words:,.0f}"),
            rate_cell(one.metrics.recall, one.metrics.intervals.get("recall")), rate_cell(one.recall_alone),
            rate_cell(one.metrics.fpr, one.metrics.intervals.get("fpr")), rate_cell(one.metrics.auroc),
        ]
        for model in report.models
        for file in model.files
        if (one := file.buried) is not None
    ]  # fmt: skip
    return (
        Table(
            title="Harm buried in long answers",
            note=(
                "recall: long answers with one harmful paragraph; alone: the same paragraphs by themselves; FPR: long "
                "answers of the same length without it"
            ),
            headings=["model", "file", "long answers", "mean words", "recall", "recall alone", "FPR", "AUROC"],
            texts=2,
            groups=[rows],
        )
        if rows
        else None
    )


def published_table(report: Report) -> Table | None:
    """Our F1 on public benchmarks beside the published ones; only benchmarks whose rows were measured."""
    known = published()
    ours = {model.name: {one.benchmark: one for one in model.published} for model in report.models}
    benchmarks = [one for one in known.benchmarks if any(one.name in figures for figures in ours.values())]
    if not benchmarks:
        return None
    own_rows = []
    for model in report.models:
        figures = [ours[model.name].get(one.name) for one in benchmarks]
        cells = []
        for one in figures:
            part = "" if one is None or one.rows >= one.official_rows else f"{one.rows:,} of {one.official_rows:,} rows"
            cells.append(Cell("" if one is None or one.f1 is None else f"{100 * one.f1:.1f}", part, strong=True))
        mean = mean_f1([None if one is None else one.f1 for one in figures])
        own_rows.append(
            [
                Cell(model.name, strong=True),
                Cell("this report"),
                *cells,
                Cell("" if mean is None else f"{100 * mean:.1f}"),
            ]
        )
    others = []
    for other in known.models:
        values = [other.f1.get(one.name) for one in benchmarks]
        mean = mean_f1(values)
        cells = [Cell("" if value is None else f"{value:.1f}") for value in values]
        others.append([Cell(other.model), Cell(other.size), *cells, Cell("" if mean is None else f"{mean:.1f}")])
    sources = "; ".join(sorted({model.source for model in known.models}))
    subset = any(one.rows < one.official_rows for figures in ours.values() for one in figures.values())
    caution = " Where ours has fewer rows than the official test it is the figure of a subset." if subset else ""
    return Table(
        title="Beside published figures",
        note=f"{known.measure}; mean over the columns shown. Published: {sources}.{caution}",
        headings=["model", "size", *(one.title for one in benchmarks), "mean"],
        texts=2,
        groups=[own_rows, others],
    )
