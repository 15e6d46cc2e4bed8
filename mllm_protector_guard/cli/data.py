"""`mllm-protector data`: looks over training files, and makes new rows with a chat model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mllm_protector_guard import __version__
from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.console import EXIT_FINDING, Messages, exit_codes, report_console
from mllm_protector_guard.cli.generate import generate
from mllm_protector_guard.errors import ConfigError

if TYPE_CHECKING:
    from mllm_protector_guard.training.findings import CheckReport

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Check training files, or make new rows. Needs the extra `train`.")
app.command()(generate)


@app.command()
def check(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help='Lines of {"question", "answer", "harmful"} or {"question", "rejected", "accepted"}, gzipped or not.',
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    against: Annotated[
        list[Path] | None,
        options.existing(
            "--against",
            metavar="FILE",
            help="An evaluation file whose questions and answers must not be in FILE; give it once a file.",
        ),
    ] = None,
    kind: Annotated[
        Literal["auto", "detector", "triples"],
        typer.Option("--kind", help="What the rows are; auto goes by the fields of each file's first row."),
    ] = "auto",
    similarity: Annotated[
        float,
        typer.Option(
            "--similarity", min=0.5, max=1.0, help="Jaccard index of three-word shingles from which texts are near."
        ),
    ] = 0.8,
    max_length_auroc: Annotated[
        float,
        typer.Option(
            "--max-length-auroc",
            min=0.5,
            max=1.0,
            help="Highest AUROC with which the answers' length alone may tell the labels apart.",
        ),
    ] = 0.7,
    max_findings: Annotated[
        int, typer.Option("--max-findings", min=0, help="List at most so many of each kind; all are counted.")
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and no table.")] = False,
    clean: Annotated[
        Path | None,
        typer.Option(
            "--write-clean",
            metavar="DIR",
            help="Write each FILE here without malformed, blank, unchanged, repeated, contradicted and leaked rows.",
            file_okay=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --write-clean write over files.")] = False,
) -> None:
    """Look over training files: bad rows, duplicates, contradicting labels, leaks, answers told by their length.

    Two rows are near when their questions are near and their answers are. A finding names a file and its lines and
    never shows a text. Of duplicates the first row stays; of rows that contradict each other none does.

    Exit code: 0 if nothing was found, 1 if something was, 2 if the command could not run.
    """
    with exit_codes():
        if force and clean is None:
            raise ConfigError("--force is for --write-clean")
        from mllm_protector_guard.training.check import check_files

        messages = Messages()
        with messages.progress as progress:
            bar = progress.add_task("check", total=None, rows=0)
            report = check_files(
                files,
                against=against or (),
                kind=None if kind == "auto" else kind,
                similarity=similarity,
                max_length_auroc=max_length_auroc,
                on_rows=lambda count: progress.update(bar, rows=count),
            )
        if clean is not None:
            _write_clean(report, clean, messages, force=force)
        _print_report(report, max_findings, as_json=as_json)
        if not report.findings:
            messages.say(f"{sum(one.rows for one in report.files):,} rows, nothing found")
        raise typer.Exit(EXIT_FINDING if report.findings else 0)


def _print_report(report: CheckReport, max_findings: int, *, as_json: bool) -> None:
    from mllm_protector_guard.training.findings import to_json, to_tables

    if as_json:
        fields = {"version": __version__, **to_json(report, max_findings=max_findings)}
        print(json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False))
        return
    report_console().print(to_tables(report, max_findings=max_findings), soft_wrap=not sys.stdout.isatty())


def _write_clean(report: CheckReport, folder: Path, messages: Messages, *, force: bool) -> None:
    from mllm_protector_guard.training.clean import write_clean

    written = write_clean(report, folder, force=force)
    for one, (target, count) in zip(report.files, written.items(), strict=True):
        reasons = Counter(report.left_out.get(one.path, {}).values())
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common()) or "none"
        messages.say(f"{target}: {count:,} rows; left out: {left_out}")
