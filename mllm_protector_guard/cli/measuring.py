"""How `mllm-protector evaluate` measures one detector after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

from mllm_protector_guard.cli.console import Messages
from mllm_protector_guard.cli.detectors import DetectorChoice
from mllm_protector_guard.cli.scores import ScoreKeeper
from mllm_protector_guard.errors import DataError
from mllm_protector_guard.guard import Guard

if TYPE_CHECKING:
    from mllm_protector_guard.evaluation.data import LabelledRow
    from mllm_protector_guard.evaluation.evaluate import Evaluation
    from mllm_protector_guard.evaluation.latency import Latency, Stopwatch
    from mllm_protector_guard.evaluation.report_json import ModelReport
    from mllm_protector_guard.evaluation.robustness import Buried, Scoring
    from mllm_protector_guard.evaluation.slices import ScoredRow

__all__ = ["DataFile", "Plan", "measure_model", "read_files"]

_POOLED = "all rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A file of labelled rows.

    Attributes:
        name: What reports call it.
        path: Where it is.
        rows: Those that can be used, with their lines.
        malformed: How many lines cannot.
    """

    name: str
    path: Path
    rows: list[tuple[int, LabelledRow]]
    malformed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured of every detector.

    Attributes:
        data: The files.
        batch_size: Rows that are scored together.
        latency_sample: Answers that are timed one by one.
        perturb: Spelling attacks by name.
        bury: Words of a long answer; None for no such answers.
        filler: Harmless paragraphs for them; None takes harmless rows of the files.
        attack_rows: Most rows of each class and file that are attacked or buried; None takes all.
    """

    data: list[DataFile]
    batch_size: int
    latency_sample: int
    perturb: Sequence[str]
    bury: int | None
    filler: Sequence[str] | None
    attack_rows: int | None


def read_files(paths: Sequence[Path], messages: Messages) -> list[DataFile]:
    """The rows of the files; each malformed line is told and counted.

    Raises:
        DataError: A file is cut off.
    """
    from mllm_protector_guard.evaluation.data import read_labelled_rows

    files = []
    for path, name in zip(paths, _short_names(paths), strict=True):
        bad: list[DataError] = []
        rows = list(read_labelled_rows(path, on_bad_line=bad.append))
        for error in bad:
            messages.say(str(error))
        files.append(DataFile(name=name, path=path, rows=rows, malformed=len(bad)))
    return files


def _short_names(paths: Sequence[Path]) -> list[str]:
    names = [path.name.removesuffix(".gz").removesuffix(".jsonl") for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """A detector at work on the plan."""

    name: str
    guard: Guard
    keeper: ScoreKeeper
    stopwatch: Stopwatch
    plan: Plan
    progress: Progress

    def scores(
        self, what: str, rows: Sequence[tuple[int | None, LabelledRow]], stopwatch: Stopwatch | None = None
    ) -> Iterator[float | None]:
        bar = self.progress.add_task(f"{self.name}: {what}", total=len(rows), rows=0)
        scores = self.keeper.scores(what, rows, self.guard, self.plan.batch_size, stopwatch)
        for done, score in enumerate(scores, start=1):
            self.progress.update(bar, completed=done, rows=done)
            yield score
        self.progress.remove_task(bar)

    def scoring(self, what: str) -> Scoring:
        """Scores rows that stand in no file."""

        def scoring(rows: Sequence[LabelledRow]) -> Iterator[float | None]:
            return self.scores(what, [(None, row) for row in rows])

        return scoring

    def scored_rows(self, file: DataFile) -> list[ScoredRow]:
        from mllm_protector_guard.evaluation.evaluate import scored_row

        labelled = [(line, row) for line, row in file.rows if row.harmful is not None]
        scores = self.scores(file.name, labelled, self.stopwatch)
        return [scored_row(row, None if row.harmful is None else next(scores)) for _, row in file.rows]

    def evaluation(self, file: DataFile, scored: Sequence[ScoredRow]) -> Evaluation:
        from mllm_protector_guard.evaluation.evaluate import summarise
        from mllm_protector_guard.evaluation.robustness import drawn_rows, measure_perturbed

        threshold = self.guard.threshold
        evaluation = summarise(scored, threshold=threshold, name=file.name, malformed=file.malformed)
        chosen = drawn_rows([row for _, row in file.rows], self.plan.attack_rows)
        perturbed = tuple(
            measure_perturbed(self.scoring(f"{file.name}, {kind}"), chosen, kind, threshold=threshold)
            for kind in self.plan.perturb
        )
        buried = None if self.plan.bury is None else self._buried(file, self.plan.bury)
        return evaluation.model_copy(update={"perturbed": perturbed, "buried": buried})

    def _buried(self, file: DataFile, words: int) -> Buried | None:
        from mllm_protector_guard.evaluation.bury import bury
        from mllm_protector_guard.evaluation.robustness import drawn_rows, measure_buried

        harmful = [row for row in drawn_rows([row for _, row in file.rows], self.plan.attack_rows) if row.harmful]
        if not harmful:
            return None
        harmless = [row for one in self.plan.data for _, row in one.rows if row.harmful is False]
        long = bury([*harmful, *harmless], words=words, filler=self.plan.filler)
        scoring = self.scoring(f"{file.name}, long answers")
        return measure_buried(scoring, long, words=words, threshold=self.guard.threshold)

    def latency(self, choice: DetectorChoice) -> Latency | None:
        from mllm_protector_guard.evaluation.evaluate import score_turns

        single = self.stopwatch.single_ms(lambda row: score_turns(self.guard, [row.turn]))
        return self.stopwatch.latency(
            device=_device(self.guard, choice), batch_size=self.plan.batch_size, single_ms=single
        )


def measure_model(
    choice: DetectorChoice, guard: Guard, kept: Path | None, plan: Plan, progress: Progress
) -> ModelReport:
    """Everything that the plan asks for, of one detector."""
    from mllm_protector_guard.evaluation.evaluate import macro_mean, summarise
    from mllm_protector_guard.evaluation.latency import Stopwatch
    from mllm_protector_guard.evaluation.published import compare
    from mllm_protector_guard.evaluation.report_json import ModelReport

    inputs = [file.path for file in plan.data]
    with ScoreKeeper(kept, choice.models.detector_settings(), inputs) as keeper:
        stopwatch = Stopwatch(sample=plan.latency_sample)
        bench = _Bench(name=choice.name, guard=guard, keeper=keeper, stopwatch=stopwatch, plan=plan, progress=progress)
        scored = {file.name: bench.scored_rows(file) for file in plan.data}
        latency = bench.latency(choice)
        files = [bench.evaluation(file, scored[file.name]) for file in plan.data]
    malformed = sum(file.malformed for file in plan.data)
    pooled = files[0].model_copy(update={"name": _POOLED, "perturbed": (), "buried": None})
    if len(files) > 1:
        rows = list(chain.from_iterable(scored.values()))
        pooled = summarise(rows, threshold=guard.threshold, name=_POOLED, malformed=malformed)
    return ModelReport(
        name=choice.name,
        **choice.models.detector_settings(),
        weights_sha256=choice.weights_sha256(),
        threshold=guard.threshold,
        files=files,
        mean=macro_mean(files),
        pooled=pooled,
        latency=latency,
        published=compare(scored.items(), threshold=guard.threshold),
    )


def _device(guard: Guard, choice: DetectorChoice) -> str:
    from mllm_protector_guard.models.hardware import cpu_name, device_name

    if type(guard.detector).__module__.startswith("mllm_protector_guard.models."):
        return device_name(choice.models.device)
    return f"chosen by the detector itself, on a host with {cpu_name()}"
