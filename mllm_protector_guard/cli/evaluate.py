"""`mllm-protector evaluate`: how well a detector tells harmful answers from harmless ones."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mllm_protector_guard import __version__
from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.choices import ModelChoice
from mllm_protector_guard.cli.console import EXIT_FINDING, Messages, exit_codes
from mllm_protector_guard.cli.scores import ScoreKeeper
from mllm_protector_guard.errors import DataError

if TYPE_CHECKING:
    from mllm_protector_guard.evaluation.data import LabelledRow
    from mllm_protector_guard.evaluation.evaluate import Evaluation

__all__ = ["evaluate"]


def evaluate(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help='JSON lines {"question", "answer", "harmful", "source"}, gzipped or not.',
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    threshold: options.Threshold = None,
    batch_size: options.BatchSize = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and no table.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write the JSON here, over what is there."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            metavar="FILE",
            help="Keep each score as it comes; a killed run goes on from there, and another threshold is quick.",
        ),
    ] = None,
    model: options.Model = "smollm2-135m",
    detector: options.Detector = None,
    detector_polarity: options.DetectorPolarity = None,
    detector_template: options.DetectorTemplate = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offline: options.Offline = False,
) -> None:
    """Measure a detector: precision, recall, F1, AUROC and FPR of each file, and their mean.

    Harmful is the positive class. A rate that a file does not define, as recall without harmful answers, stays empty
    (null in JSON) and out of the mean. Rows whose `harmful` is null are counted and not measured; a blank answer
    counts as scored 0, which is how the guard treats it. Needs the extra `train`.

    Exit code: 0; 1 if a line was malformed, a row could not be scored or a file has no label; 2 if the command could
    not run.
    """
    with exit_codes():
        choice = ModelChoice(
            model=model,
            detector=detector,
            detector_polarity=detector_polarity,
            detector_template=detector_template,
            device=device,
            dtype=dtype,
            offline=offline,
        )
        with redirect_stdout(sys.stderr):  # standard output is for the report, whatever a detector prints
            evaluations = _evaluate(choice, files, threshold, batch_size, scores)
        raise typer.Exit(_report(evaluations, choice, as_json=as_json, output=output))


@dataclass(frozen=True, slots=True, kw_only=True)
class _DataFile:
    path: Path
    rows: list[tuple[int, LabelledRow]]
    malformed: int


def _read(path: Path, messages: Messages) -> _DataFile:
    from mllm_protector_guard.evaluation.data import read_labelled_rows

    bad: list[DataError] = []
    rows = list(read_labelled_rows(path, on_bad_line=bad.append))
    for error in bad:
        messages.say(str(error))
    return _DataFile(path=path, rows=rows, malformed=len(bad))


def _evaluate(
    choice: ModelChoice, paths: list[Path], threshold: float | None, batch_size: int, kept: Path | None
) -> list[Evaluation]:
    # Imported first: a missing extra must show before the models load and not after all is scored.
    from mllm_protector_guard.evaluation.evaluate import ScoredLabel, scoring_guard, summarise

    messages = Messages()
    guard = scoring_guard(choice.load_detector(), threshold=threshold)
    data = [_read(path, messages) for path in paths]
    evaluations = []
    with ScoreKeeper(kept, choice.detector_settings(), paths) as keeper, messages.progress as progress:
        total = sum(row.harmful is not None for one in data for _, row in one.rows)
        bar = progress.add_task("evaluate", total=total, rows=0)
        done = 0
        for one, name in zip(data, _short_names(paths), strict=True):
            labelled = [(line, row) for line, row in one.rows if row.harmful is not None]
            scored = [ScoredLabel(harmful=None, harm_score=None)] * (len(one.rows) - len(labelled))
            scores = keeper.scores(one.path, labelled, guard, batch_size)
            for (_, row), score in zip(labelled, scores, strict=True):
                scored.append(ScoredLabel(harmful=row.harmful, harm_score=score))
                done += 1
                progress.update(bar, completed=done, rows=done)
            evaluations.append(summarise(scored, threshold=guard.threshold, name=name, malformed=one.malformed))
    return evaluations


def _short_names(paths: list[Path]) -> list[str]:
    names = [path.name.removesuffix(".gz").removesuffix(".jsonl") for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _report(evaluations: list[Evaluation], choice: ModelChoice, *, as_json: bool, output: Path | None) -> int:
    from rich.console import Console

    from mllm_protector_guard.evaluation.report import to_json, to_table

    report = {"version": __version__, **choice.detector_settings(), **to_json(evaluations)}
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        # A file or pipe has no width of its own; a narrow default would fold the table.
        Console(width=None if sys.stdout.isatty() else 120).print(to_table(evaluations))
    messages = Messages()
    incomplete = [one for one in evaluations if one.malformed or one.failed or one.metrics.measured == 0]
    for one in incomplete:
        messages.say(
            f"{one.name}: {one.metrics.measured:,} of {one.rows:,} rows measured, {one.unlabelled:,} without label, "
            f"{one.failed:,} not scored, {one.malformed:,} malformed lines"
        )
    return EXIT_FINDING if incomplete else 0
