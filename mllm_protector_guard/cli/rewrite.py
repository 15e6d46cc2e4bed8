"""`mllm-protector rewrite`: writes a harmless answer for each harmful one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from mllm_protector_guard import calls
from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.choices import ModelChoice
from mllm_protector_guard.cli.console import exit_codes
from mllm_protector_guard.cli.source import turn_of
from mllm_protector_guard.cli.stream import Job, Streams, Work, describe, run_job
from mllm_protector_guard.errors import DetoxifierError
from mllm_protector_guard.jsonl import Row
from mllm_protector_guard.ports import Detoxifier
from mllm_protector_guard.timelimit import TimeLimit

__all__ = ["rewrite"]


def rewrite(
    source: options.Input = Path("-"),
    output: options.Output = None,
    batch_size: options.BatchSize = 8,
    resume: options.Resume = False,
    force: options.Force = False,
    model: options.Model = "smollm2-135m",
    detoxifier: options.Detoxifier = None,
    detoxifier_template: options.DetoxifierTemplate = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offline: options.Offline = False,
) -> None:
    """Rewrite harmful answers: adds `text`, a harmless answer to the question.

    Every answer is taken to be harmful and gets one rewrite, which is not scored: use `check` for texts that people
    will see. Where none could be written `text` is null and `error` names the class of the error. Rows come out in
    the order they went in, with all their fields.

    Exit code: 0; 1 if a line was malformed or a row failed; 2 if the command could not run.
    """
    with exit_codes():
        choice = ModelChoice(
            model=model,
            detoxifier=detoxifier,
            detoxifier_template=detoxifier_template,
            device=device,
            dtype=dtype,
            offline=offline,
        )

        def load(tell: Callable[[str], None]) -> Work:
            loaded = choice.load_detoxifier()
            calls.warm_up(loaded)
            return lambda rows: _rewrites(loaded, rows, tell)

        job = Job(verb="rewrite", adds=("text", "error"), settings=choice.detoxifier_settings(), load=load)
        streams = Streams(
            source=options.as_source(source), output=output, resume=resume, force=force, batch_size=batch_size
        )
        raise typer.Exit(run_job(job, streams))


def _rewrites(detoxifier: Detoxifier, rows: Sequence[Row], tell: Callable[[str], None]) -> list[dict[str, Any]]:
    added: list[dict[str, Any]] = []
    texts = calls.rewrite(detoxifier, [turn_of(row) for row in rows], 0, TimeLimit(None))
    for row, text in zip(rows, texts, strict=True):
        if isinstance(text, str) and text.strip():
            added.append({"text": text})
        else:
            error = DetoxifierError("no rewrite could be written") if isinstance(text, str) else text
            tell(describe(row, error))
            added.append({"text": None, "error": type(error).__name__})
    return added
