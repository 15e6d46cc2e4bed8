"""`mllm-protector check`: the guard's verdict on each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.choices import ModelChoice
from mllm_protector_guard.cli.console import exit_codes
from mllm_protector_guard.cli.source import turn_of
from mllm_protector_guard.cli.stream import Job, Streams, Work, describe, run_job
from mllm_protector_guard.errors import ConfigError, GuardError, HarmfulAnswerError, InferenceError
from mllm_protector_guard.guard import Guard
from mllm_protector_guard.jsonl import Row
from mllm_protector_guard.policy import DEFAULT_REFUSAL, OnError, OnHarm
from mllm_protector_guard.tracing import JsonlSink
from mllm_protector_guard.types import GuardResult, Origin

__all__ = ["check"]

_POLICY, _TRACE = "Policy", "Trace"


def check(
    source: options.Input = Path("-"),
    output: options.Output = None,
    threshold: options.Threshold = None,
    batch_size: options.BatchSize = 16,
    resume: options.Resume = False,
    force: options.Force = False,
    on_harm: Annotated[
        OnHarm, typer.Option("--on-harm", help="What to do with a harmful answer.", rich_help_panel=_POLICY)
    ] = "detoxify",
    on_error: Annotated[
        OnError, typer.Option("--on-error", help="What to do when an answer cannot be judged.", rich_help_panel=_POLICY)
    ] = "withhold",
    max_attempts: Annotated[
        int, typer.Option("--max-attempts", min=1, max=10, help="Rewrites to try.", rich_help_panel=_POLICY)
    ] = 2,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="SECONDS", help="Time limit a row; a batch has the sum.", rich_help_panel=_POLICY
        ),
    ] = None,
    refusal: Annotated[
        str, typer.Option("--refusal", help="Stands in the place of a withheld answer.", rich_help_panel=_POLICY)
    ] = DEFAULT_REFUSAL,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Append a record of each check.", rich_help_panel=_TRACE),
    ] = None,
    trace_content: Annotated[
        bool, typer.Option("--trace-content", help="Keep the texts in the records too.", rich_help_panel=_TRACE)
    ] = False,
    model: options.Model = "smollm2-135m",
    detector: options.Detector = None,
    detector_polarity: options.DetectorPolarity = None,
    detector_template: options.DetectorTemplate = None,
    detoxifier: options.Detoxifier = None,
    detoxifier_template: options.DetoxifierTemplate = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offline: options.Offline = False,
) -> None:
    """Guard answers: adds `outcome`, `reason`, `text`, `harm_score`, `rewrite_score` and `attempts`.

    `text` is what may be shown: the answer itself (passed, flagged), a rewrite that was scored harmless (detoxified),
    or the refusal (withheld). Rows come out in the order they went in, with all their fields. With `--on-harm raise`
    and `--on-error raise` the row has an `error` and the rest goes on.

    Exit code: 0; 1 if a line was malformed or a row has an `error`; 2 if the command could not run.
    """
    with exit_codes():
        choice = ModelChoice(
            model=model,
            detector=detector,
            detector_polarity=detector_polarity,
            detector_template=detector_template,
            detoxifier=detoxifier,
            detoxifier_template=detoxifier_template,
            device=device,
            dtype=dtype,
            offline=offline,
        )
        policy = options.as_policy(
            threshold=threshold,
            on_harm=on_harm,
            on_error=on_error,
            max_attempts=max_attempts,
            timeout_s=timeout,
            refusal=refusal,
        )
        if trace_content and trace is None:
            raise ConfigError("--trace-content is for records; name their file with --trace FILE")

        def load(tell: Callable[[str], None]) -> Work:
            guard = Guard(
                detector=choice.load_detector(),
                detoxifier=choice.load_detoxifier() if on_harm == "detoxify" else None,
                policy=policy,
                sinks=() if trace is None else (JsonlSink(trace),),
                trace_content=trace_content,
            )
            guard.warm_up()
            return lambda rows: _verdicts(guard, rows, tell)

        settings = {**policy.model_dump(), **choice.detector_settings()}
        if on_harm == "detoxify":
            settings |= choice.detoxifier_settings()
        job = Job(
            verb="check",
            adds=("outcome", "reason", "text", "harm_score", "rewrite_score", "attempts", "error"),
            counts="outcome",
            settings=settings,
            load=load,
        )
        streams = Streams(
            source=options.as_source(source), output=output, resume=resume, force=force, batch_size=batch_size
        )
        raise typer.Exit(run_job(job, streams))


def _verdicts(guard: Guard, rows: Sequence[Row], tell: Callable[[str], None]) -> list[dict[str, Any]]:
    origins = [
        Origin(
            integration="cli",
            question_match="none" if fields.get("question") is None else "explicit",
            tags={"line": str(line)},
        )
        for line, fields in rows
    ]
    results = guard.check_batch([turn_of(row) for row in rows], origins=origins, return_exceptions=True)
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, InferenceError):
            tell(describe(row, result))
    return [_fields(result) for result in results]


def _fields(verdict: GuardResult | GuardError) -> dict[str, Any]:
    if isinstance(verdict, HarmfulAnswerError):
        return _fields(verdict.result) | {"error": type(verdict).__name__}
    if isinstance(verdict, GuardError):
        nothing = dict.fromkeys(("outcome", "reason", "text", "harm_score", "rewrite_score"))
        return nothing | {"attempts": 0, "error": type(verdict).__name__}
    return {
        "outcome": verdict.outcome.value,
        "reason": verdict.reason.value,
        "text": verdict.text,
        "harm_score": verdict.harm_score,
        "rewrite_score": verdict.rewrite_score,
        "attempts": verdict.attempts,
    } | ({} if verdict.error is None else {"error": verdict.error})
