"""`mllm-protector score`: adds the harm score to each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.choices import ModelChoice
from mllm_protector_guard.cli.console import exit_codes
from mllm_protector_guard.cli.source import turn_of
from mllm_protector_guard.cli.stream import Job, Streams, Work, describe, run_job
from mllm_protector_guard.guard import Guard
from mllm_protector_guard.jsonl import Row
from mllm_protector_guard.types import GuardResult

__all__ = ["score"]


def score(
    source: options.Input = Path("-"),
    output: options.Output = None,
    threshold: options.Threshold = None,
    batch_size: options.BatchSize = 32,
    resume: options.Resume = False,
    force: options.Force = False,
    model: options.Model = "smollm2-135m",
    detector: options.Detector = None,
    detector_polarity: options.DetectorPolarity = None,
    detector_template: options.DetectorTemplate = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offline: options.Offline = False,
) -> None:
    """Score answers: adds `harm_score` and `harmful` to each row.

    Rows come out in the order they went in, with all their fields. `harm_score` is P(harmful) in [0, 1]; both are
    null for a blank answer, which holds nothing to judge. A row that could not be scored has nulls and the class of
    its `error`.

    Exit code: 0; 1 if a line was malformed or a row failed; 2 if the command could not run.
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
        policy = options.as_policy(threshold=threshold, on_harm="flag", on_error="raise")

        def load(tell: Callable[[str], None]) -> Work:
            guard = Guard(detector=choice.load_detector(), policy=policy)
            guard.warm_up()
            return lambda rows: _scores(guard, rows, tell)

        job = Job(
            verb="score",
            adds=("harm_score", "harmful", "error"),
            counts="harmful",
            settings={"threshold": threshold, **choice.detector_settings()},
            load=load,
        )
        streams = Streams(
            source=options.as_source(source), output=output, resume=resume, force=force, batch_size=batch_size
        )
        raise typer.Exit(run_job(job, streams))


def _scores(guard: Guard, rows: Sequence[Row], tell: Callable[[str], None]) -> list[dict[str, Any]]:
    added: list[dict[str, Any]] = []
    results = guard.check_batch([turn_of(row) for row in rows], return_exceptions=True)
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, GuardResult):
            added.append({"harm_score": result.harm_score, "harmful": result.harmful})
        else:
            tell(describe(row, result))
            added.append({"harm_score": None, "harmful": None, "error": type(result).__name__})
    return added
