"""`mllm-protector evaluate`: how well detectors tell harmful answers from harmless ones."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mllm_protector_guard import __version__
from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.choices import ModelChoice
from mllm_protector_guard.cli.console import EXIT_FINDING, Messages, exit_codes
from mllm_protector_guard.cli.detectors import DetectorChoice, choose_detectors
from mllm_protector_guard.cli.report_targets import ReportTargets
from mllm_protector_guard.errors import ConfigError

if TYPE_CHECKING:
    from mllm_protector_guard.cli.measuring import Plan
    from mllm_protector_guard.evaluation.report_json import ModelReport, Report

__all__ = ["evaluate"]

_DEFAULT_MODEL = "smollm2-135m"
_MODELS, _ATTACKS, _REPORTS = "Models", "Attacks", "Reports"


def evaluate(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help='JSON lines {"question", "answer", "harmful", "source", "extra": {"lang"}}, gzipped or not.',
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    threshold: options.Threshold = None,
    batch_size: options.BatchSize = 32,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            metavar="FILE|DIR",
            help="Keep each score as it comes; a killed run goes on from there, and another threshold is quick. "
            "With several detectors a folder, which gets a file for each.",
        ),
    ] = None,
    latency_sample: Annotated[
        int,
        typer.Option(
            "--latency-sample", min=0, help="Answers that are scored once more, one a call, for their time; 0 for none."
        ),
    ] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and no table.", rich_help_panel=_REPORTS)] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Also write the JSON here, over what is there.",
            rich_help_panel=_REPORTS,
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="Also write Markdown here.", rich_help_panel=_REPORTS),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write one page with tables and curves here; it loads nothing.",
            rich_help_panel=_REPORTS,
        ),
    ] = None,
    slices: Annotated[
        bool,
        typer.Option(
            "--slices",
            help="Print the tables by source, language and length too; JSON and pages always have them.",
            rich_help_panel=_REPORTS,
        ),
    ] = False,
    perturb: Annotated[
        list[str] | None,
        typer.Option(
            "--perturb",
            metavar="KIND",
            help="Measure answers under a spelling attack too: zero-width, homoglyph, leetspeak, spacing, fullwidth, "
            "base64, or all. May be given several times.",
            rich_help_panel=_ATTACKS,
        ),
    ] = None,
    bury: Annotated[
        int | None,
        typer.Option(
            "--bury",
            min=1,
            metavar="WORDS",
            help="Measure harmful answers as one paragraph of a harmless text of so many words too; 1500 words are "
            "about 2,000 tokens.",
            rich_help_panel=_ATTACKS,
        ),
    ] = None,
    filler: Annotated[
        Path | None,
        options.existing(
            "--filler",
            metavar="FILE",
            help="Harmless text for --bury, its paragraphs parted by blank lines. [default: harmless answers of the "
            "data]",
            show_default=False,
            rich_help_panel=_ATTACKS,
        ),
    ] = None,
    attack_rows: Annotated[
        int,
        typer.Option(
            "--attack-rows",
            min=0,
            metavar="N",
            help="At most so many harmful and so many harmless rows of a file are attacked or buried, drawn with a "
            "fixed seed; 0 for all.",
            rich_help_panel=_ATTACKS,
        ),
    ] = 0,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME|DIR",
            rich_help_panel=_MODELS,
            help=f"A pair of models, to measure its detector; may be given several times. [default: {_DEFAULT_MODEL}]",
            show_default=False,
        ),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            metavar="NAME|DIR|IMPORT[,SETTING=...]",
            rich_help_panel=_MODELS,
            help="A detector: name, folder, hub id, or `module:attribute`. May be given several times, each with "
            "settings of its own: polarity=, label=, template=, threshold=, and name= for the report.",
        ),
    ] = None,
    detector_polarity: options.DetectorPolarity = None,
    detector_label: Annotated[
        str | None,
        typer.Option(
            "--detector-label",
            metavar="LABEL",
            help="Label to read of a foreign detector that has several.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    detector_template: options.DetectorTemplate = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offline: options.Offline = False,
) -> None:
    """Measure detectors on labelled answers, several side by side if you like.

    For each file, for all rows, and for their parts by source, language and answer length: precision, recall, F1,
    AUROC, AUPRC, false positive rate, recall at 1 % false positives and calibration error, with 95 % intervals; how
    long scoring takes; what spelling attacks and long answers do to it; and published figures beside ours, where rows
    have the `source` of a public benchmark.

    Harmful is the positive class. A rate that the classes of the rows do not define, as recall without harmful
    answers, stays empty (null in JSON) and out of the mean. Rows whose `harmful` is null are counted and not measured;
    a blank answer counts as scored 0, which is how the guard treats it. Needs the extra `train`.

        mllm-protector evaluate data.jsonl --detector my-detector --detector other-folder,polarity=harmful,label=toxic,template=answer_only

    Exit code: 0; 1 if a line was malformed, a row could not be scored or a file has no label; 2 if the command could
    not run.
    """  # noqa: E501
    with exit_codes():
        choices = choose_detectors(
            detector or [],
            model or [],
            threshold=threshold,
            shared=ModelChoice(
                model=_DEFAULT_MODEL,
                detector_polarity=detector_polarity,
                detector_template=detector_template,
                detector_label=detector_label,
                device=device,
                dtype=dtype,
                offline=offline,
            ),
        )
        targets = ReportTargets(as_json=as_json, output=output, markdown=markdown, html=html, slices=slices)
        targets.require_apart_from([*files, *([filler] if filler else [])])
        with redirect_stdout(sys.stderr):  # standard output is for the report, whatever a detector prints
            plan = _plan(files, batch_size, latency_sample, perturb or [], bury, filler, attack_rows)
            report = _measure(choices, plan, scores)
        targets.write(report)
        raise typer.Exit(_findings(report))


def _plan(
    paths: list[Path],
    batch_size: int,
    latency_sample: int,
    kinds: list[str],
    bury: int | None,
    filler: Path | None,
    attack_rows: int,
) -> Plan:
    from mllm_protector_guard.cli.measuring import Plan, read_files
    from mllm_protector_guard.evaluation.bury import paragraphs_of
    from mllm_protector_guard.evaluation.perturb import PERTURBATIONS

    if unknown := sorted({*kinds} - {*PERTURBATIONS, "all"}):
        raise ConfigError(f"--perturb {', '.join(unknown)}: use {', '.join(PERTURBATIONS)} or all")
    if filler is not None and bury is None:
        raise ConfigError("--filler is the text for --bury; give --bury too")
    try:
        paragraphs = None if filler is None else paragraphs_of(filler.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"--filler {str(filler)!r} is no text in UTF-8") from error
    return Plan(
        data=read_files(paths, Messages()),
        batch_size=batch_size,
        latency_sample=latency_sample,
        perturb=[kind for kind in PERTURBATIONS if kind in kinds or "all" in kinds],
        bury=bury,
        filler=paragraphs,
        attack_rows=attack_rows or None,
    )


def _measure(choices: list[DetectorChoice], plan: Plan, kept: Path | None) -> Report:
    from mllm_protector_guard.cli.measuring import measure_model
    from mllm_protector_guard.cli.scores import score_files
    from mllm_protector_guard.evaluation.evaluate import scoring_guard
    from mllm_protector_guard.evaluation.report_json import Report

    # All are found before one is loaded, so that a wrong name shows at once; one at a time is in memory.
    guards = [scoring_guard(choice.models.load_detector(), threshold=choice.threshold) for choice in choices]
    score_paths = score_files(kept, [choice.name for choice in choices])
    models: list[ModelReport] = []
    with Messages().progress as progress:
        for choice, path in zip(choices, score_paths, strict=True):
            models.append(measure_model(choice, guards.pop(0), path, plan, progress))
    return Report(version=__version__, models=models)


def _findings(report: Report) -> int:
    messages = Messages()
    code = 0
    for model in report.models:
        for one in model.files:
            if one.malformed or one.failed or one.metrics.measured == 0:
                code = EXIT_FINDING
                messages.say(
                    f"{model.name}, {one.name}: {one.metrics.measured:,} of {one.rows:,} rows measured, "
                    f"{one.unlabelled:,} without label, {one.failed:,} not scored, {one.malformed:,} malformed lines"
                )
    return code
