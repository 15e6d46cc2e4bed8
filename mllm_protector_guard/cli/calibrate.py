"""`mllm-protector calibrate`: fits temperature and threshold of a detector to a user's own answers."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mllm_protector_guard import __version__
from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.calibration_rows import Answers, read_answers, score_answers
from mllm_protector_guard.cli.choices import ModelChoice
from mllm_protector_guard.cli.console import EXIT_FINDING, Messages, exit_codes, report_console
from mllm_protector_guard.cli.scores import ScoreKeeper
from mllm_protector_guard.errors import ConfigError

if TYPE_CHECKING:
    from mllm_protector_guard.cli.calibration_report import Report
    from mllm_protector_guard.guard import Guard
    from mllm_protector_guard.training.calibrate import FprBound

__all__ = ["calibrate"]


def calibrate(
    safe: Annotated[
        list[Path],
        options.existing(
            "--safe",
            help='Lines of {"question", "answer"} with answers that are to pass, drawn as those to come.',
        ),
    ],
    labelled: Annotated[
        list[Path] | None,
        options.existing(
            "--labelled",
            help='Lines of {"question", "answer", "harmful"}, for the temperature.',
        ),
    ] = None,
    max_fpr: Annotated[
        float, typer.Option("--max-fpr", help="Largest share of safe answers that may be flagged.")
    ] = 0.01,
    bound: Annotated[
        Literal["clopper-pearson", "conformal"],
        typer.Option(
            "--bound",
            help="How --max-fpr is promised: with --confidence for this threshold, or on average over safe files.",
        ),
    ] = "clopper-pearson",
    confidence: Annotated[
        float | None,
        typer.Option("--confidence", help="Of the clopper-pearson bound. [default: 0.95]", show_default=False),
    ] = None,
    prefer: Annotated[
        Literal["guarantee", "f1"],
        typer.Option(
            "--prefer", help="The lowest threshold of the bound, or one above it with the best F1 on --labelled."
        ),
    ] = "guarantee",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write a calibrated copy of the checkpoint here.", file_okay=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint in -o DIR.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and no table.")] = False,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            metavar="FILE",
            help="Keep each score as it comes; a killed run goes on from there, and another bound is quick.",
        ),
    ] = None,
    batch_size: options.BatchSize = 32,
    model: options.Model = "smollm2-135m",
    detector: options.Detector = None,
    detector_polarity: options.DetectorPolarity = None,
    detector_template: options.DetectorTemplate = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offline: options.Offline = False,
) -> None:
    """Calibrate a detector on your own answers, with a bound on its false positives.

    The threshold comes from the safe answers alone. `clopper-pearson`: with `--confidence` over the draw of the safe
    answers, at most `--max-fpr` of further such answers are flagged. `conformal`: at most `--max-fpr` on average over
    such draws, which needs fewer answers. Both hold for answers drawn independently from one source: give one answer a
    question, of your own traffic, and keep device and dtype.

    With labelled answers the temperature is fitted too, and its errors (ECE in 15 bins, Brier, negative log-likelihood)
    are measured on questions that it was not fitted on. Give `--safe` and `--labelled` once a file. Blank answers are
    left out; a safe answer that cannot be scored counts as flagged. Needs the extra `train`.

    The folder of `--output` serves as `--detector DIR`. A detector without `guard.json` has no copy; pass the printed
    threshold to it as `threshold=`.

    Exit code: 0; 1 if a row could not be scored, or a line is malformed, and then nothing is scored; 2 if the command
    could not run.
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
        if confidence is not None and bound == "conformal":
            raise ConfigError("--confidence is for --bound clopper-pearson; the conformal bound holds on average")
        if prefer == "f1" and not labelled:
            raise ConfigError("--prefer f1 needs answers whose F1 counts; give --labelled")
        with redirect_stdout(sys.stderr):  # standard output is for the report, whatever a detector prints
            # Imported first: a missing extra must show before the models load and not after all is scored.
            from mllm_protector_guard.training.calibrate import FprBound

            promise = FprBound(kind=bound, max_fpr=max_fpr, confidence=0.95 if confidence is None else confidence)
            answers = _read(safe, labelled or [], promise)
            folder = _folder(choice, output, force=force)
            guard = _scoring_guard(choice)
            _score(answers, guard, choice, scores, batch_size)
            report = _calibrated(answers, guard, promise, prefer, folder)
            if folder is not None and output is not None:
                report.write_copy(folder, output, force=force)
        _show(report, choice, as_json=as_json)
        raise typer.Exit(EXIT_FINDING if any(one.failed for one in answers) else 0)


def _read(safe: list[Path], labelled: list[Path], bound: FprBound) -> tuple[Answers, Answers]:
    """Both sets of answers, refused before anything is scored if they are too few."""
    import numpy as np

    from mllm_protector_guard.training.reliability import question_folds

    answers = read_answers(safe, safe=True), read_answers(labelled, safe=False)
    bound.require_rows(len(answers[0].rows))
    if labelled:
        question_folds(np.array(answers[1].labels, dtype=bool), answers[1].questions)
    return answers


def _folder(choice: ModelChoice, output: Path | None, *, force: bool) -> Path | None:
    """Where the checkpoint of the detector lies, None if it is not in our format; refused if it cannot be copied."""
    from mllm_protector_guard.training.calibrated_copy import detector_folder, require_free

    name = choice.detector or choice.model
    folder = detector_folder(name, local_files_only=choice.offline or None)
    if output is not None:
        if folder is None:
            raise ConfigError(
                f"{name!r} has no guard.json, so that no calibrated copy can be written. Leave --output out, and pass "
                "the printed threshold to load_detector(threshold=) or GuardPolicy(threshold=)."
            )
        require_free(folder, output, force=force)
    return folder


def _scoring_guard(choice: ModelChoice) -> Guard:
    from mllm_protector_guard.evaluation.evaluate import scoring_guard

    return scoring_guard(choice.load_detector())


def _score(
    answers: tuple[Answers, Answers], guard: Guard, choice: ModelChoice, kept: Path | None, batch_size: int
) -> None:
    messages = Messages()
    paths = [path for one in answers for path in one.paths]
    with ScoreKeeper(kept, choice.detector_settings(), paths) as keeper, messages.progress as progress:
        bar = progress.add_task("calibrate", total=sum(len(one.rows) for one in answers), rows=0)
        done = 0
        for one in answers:
            for score in score_answers(one, keeper, guard, batch_size):
                one.scores.append(score)
                done += 1
                progress.update(bar, completed=done, rows=done)


def _calibrated(
    answers: tuple[Answers, Answers],
    guard: Guard,
    bound: FprBound,
    prefer: Literal["guarantee", "f1"],
    folder: Path | None,
) -> Report:
    from mllm_protector_guard.cli.calibration_report import Report
    from mllm_protector_guard.training.calibrated_copy import read_detector_config
    from mllm_protector_guard.training.recalibrate import recalibrate

    safe, labelled = answers
    config = None if folder is None else read_detector_config(folder)
    result = recalibrate(
        safe.safe_scores(),
        labelled.labelled_scores() if labelled.paths else None,
        bound,
        prefer=prefer,
        rescale=config is not None,
    )
    return Report(
        result=result,
        bound=bound,
        prefer=prefer,
        safe=safe,
        labelled=labelled,
        threshold_before=guard.threshold,
        config=config,
    )


def _show(report: Report, choice: ModelChoice, *, as_json: bool) -> None:
    if as_json:
        fields = {"version": __version__, **choice.detector_settings(), **report.to_json()}
        print(json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        console = report_console()
        for table in report.to_tables():
            console.print(table)
    messages = Messages()
    for note in report.notes():
        messages.say(note)
