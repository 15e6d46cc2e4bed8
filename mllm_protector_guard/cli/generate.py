"""`mllm-protector data generate`: makes training rows with a chat model."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mllm_protector_guard import __version__
from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.chat import ChatChoice, as_fields
from mllm_protector_guard.cli.console import EXIT_FINDING, Messages, exit_codes
from mllm_protector_guard.cli.sink import RowSink, open_sink
from mllm_protector_guard.jsonl import dump_row, read_rows

if TYPE_CHECKING:
    from mllm_protector_guard.training.drafts import ChatModel
    from mllm_protector_guard.training.endpoint import Meter
    from mllm_protector_guard.training.generate import GenerationPlan, GenerationReport

__all__ = ["generate"]


_ROWS, _ENDPOINT, _LOCAL, _BUDGET = "Rows", "Endpoint", "Local model", "Budget"


def generate(
    output: options.Output = None,
    resume: options.Resume = False,
    force: options.Force = False,
    count: Annotated[int, typer.Option("--count", min=1, help="Drafts for each scenario.", rich_help_panel=_ROWS)] = 20,
    shape: Annotated[
        Literal["triples", "detector"],
        typer.Option(
            "--as", help="One row of question, rejected, accepted a draft, or two labelled.", rich_help_panel=_ROWS
        ),
    ] = "triples",
    names: Annotated[
        list[str] | None,
        typer.Option("--scenario", metavar="NAME", help="Only this one; may be given again.", rich_help_panel=_ROWS),
    ] = None,
    scenarios: Annotated[
        Path | None,
        options.existing(
            "--scenarios",
            metavar="FILE",
            help="More scenarios: a YAML or JSON list of name and description.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    languages: Annotated[
        list[str] | None,
        typer.Option(
            "--language",
            help="Drawn from for each draft; may be given again. [default: English]",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    known: Annotated[
        list[Path] | None,
        options.existing(
            "--known",
            metavar="FILE",
            help="Rows whose questions are not to come again.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    tries: Annotated[
        int, typer.Option("--tries", min=1, help="How often to ask for a draft.", rich_help_panel=_ROWS)
    ] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Another seed gives other drafts.", rich_help_panel=_ROWS)] = 0,
    protocol: Annotated[
        Literal["auto", "json", "plain"],
        typer.Option(
            "--protocol",
            help="One prompt for a JSON object, or three short ones for plain text; auto is json for an endpoint.",
        ),
    ] = "auto",
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="Of the sampling.")] = 0.8,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=16, help="Longest reply in tokens. [default: 1200; 300 for a local model]"),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint", metavar="URL", help="OpenAI-compatible API, as https://host/v1.", rich_help_panel=_ENDPOINT
        ),
    ] = None,
    chat_model: Annotated[
        str | None,
        typer.Option("--chat-model", metavar="NAME", help="The model's name there.", rich_help_panel=_ENDPOINT),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env", metavar="VARIABLE", help="Environment variable with the key.", rich_help_panel=_ENDPOINT
        ),
    ] = None,
    body: Annotated[
        str | None,
        typer.Option(
            "--body",
            metavar="JSON",
            help='More fields of each request; null takes one out, as in {"seed": null}.',
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0.1, help="Longest silence of the endpoint.", rich_help_panel=_ENDPOINT
        ),
    ] = 120.0,
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            min=0,
            help="How often a request is repeated when the endpoint is busy or fails; pauses grow.",
            rich_help_panel=_ENDPOINT,
        ),
    ] = 6,
    concurrency: Annotated[
        int,
        typer.Option("--concurrency", min=1, max=256, help="Drafts asked for at once.", rich_help_panel=_ENDPOINT),
    ] = 4,
    local: Annotated[
        str | None,
        typer.Option("--local", metavar="NAME|DIR", help="A chat model on this machine.", rich_help_panel=_LOCAL),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    offline: options.Offline = False,
    max_requests: Annotated[
        int | None, typer.Option("--max-requests", min=1, help="Requests of this run.", rich_help_panel=_BUDGET)
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            "--max-cost", min=0.0, help="Stop asking when so much is spent in this run.", rich_help_panel=_BUDGET
        ),
    ] = None,
    price_in: Annotated[
        float | None, typer.Option("--price-in", min=0.0, help="Of a million prompt tokens.", rich_help_panel=_BUDGET)
    ] = None,
    price_out: Annotated[
        float | None, typer.Option("--price-out", min=0.0, help="Of a million written tokens.", rich_help_panel=_BUDGET)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the prompts and ask nobody.")] = False,
) -> None:
    """Make training rows with a chat model: a question, a harmful answer, and the answer that corrects it.

    The scenarios are the 13 of MM-SafetyBench. Labels are right by construction and not by a judge: look at a sample
    before training. Texts go to the endpoint you name and nowhere else. Each row is written at once; with `--resume` a
    killed run goes on, and asks only for what is missing.

    Exit code: 0 if every draft was made; 1 if some are missing, or a limit was reached; 2 if the command could not run.
    """
    with exit_codes():
        from mllm_protector_guard.training.endpoint import Meter
        from mllm_protector_guard.training.generate import GenerationPlan, planned_prompts
        from mllm_protector_guard.training.scenarios import load_scenarios

        choice = ChatChoice(
            endpoint=endpoint,
            chat_model=chat_model,
            api_key_env=api_key_env,
            body=as_fields(body),
            timeout_s=timeout,
            retries=retries,
            local=local,
            device=device,
            dtype=dtype,
            offline=offline,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        plan = GenerationPlan(
            scenarios=load_scenarios(scenarios, names=names or ()),
            count=count,
            protocol=choice.protocol if protocol == "auto" else protocol,
            shape=shape,
            languages=tuple(languages or ("English",)),
            tries=tries,
            concurrency=1 if local else concurrency,
            seed=seed,
        )
        if dry_run:
            for fields in planned_prompts(plan):
                print(dump_row(fields).decode(), end="")
            raise typer.Exit
        meter = Meter(max_requests=max_requests, max_cost=max_cost, price_in=price_in, price_out=price_out)
        with redirect_stdout(sys.stderr):
            chat = choice.load(meter)
        settings = {
            "command": "generate",
            "version": __version__,
            "protocol": plan.protocol,
            "as": shape,
            "languages": list(plan.languages),
            "seed": seed,
            **choice.settings(),
        }
        messages = Messages(show_progress=output is not None)
        with (
            open_sink(output, settings, resume=resume, force=force, inputs=known or ()) as sink,
            redirect_stdout(sys.stderr),  # standard output is for rows, whatever a library prints
        ):
            report = _make(plan, chat, meter, sink, known or (), messages)
        _tell(report, plan, meter, messages)
        raise typer.Exit(EXIT_FINDING if report.missing or report.stopped else 0)


def _questions(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        for _, fields in read_rows(path):
            if isinstance(question := fields.get("question"), str):
                yield question


def _make(
    plan: GenerationPlan, chat: ChatModel, meter: Meter, sink: RowSink, known: Sequence[Path], messages: Messages
) -> GenerationReport:
    from mllm_protector_guard.training.generate import generate as make_rows

    with messages.progress as progress:
        finished = list(sink.finished())
        total = len(plan.unfinished(finished))
        bar = progress.add_task("generate", total=total, rows=0)
        if finished:
            messages.say(f"{len(finished):,} rows are there already; {total:,} drafts to make")
        if plan.shape == "detector" and (halves := _halves(finished)):
            messages.say(f"{halves:,} drafts have one row of two, for a run was killed between them; they stay so")
        return make_rows(
            plan,
            chat,
            meter,
            write=sink.write,
            finished=finished,
            known_questions=_questions(known),
            on_draft=lambda report: progress.update(bar, completed=report.made + report.missing, rows=report.made),
        )


def _halves(rows: Sequence[Mapping[str, Any]]) -> int:
    drafts = Counter((row["extra"]["scenario"], row["extra"]["item"]) for row in rows)
    return sum(count == 1 for count in drafts.values())


def _tell(report: GenerationReport, plan: GenerationPlan, meter: Meter, messages: Messages) -> None:
    parts = [f"{report.made:,} drafts made", f"{report.missing:,} missing", f"{meter.requests:,} requests"]
    if meter.prompt_tokens or meter.written_tokens:
        parts.append(f"{meter.prompt_tokens:,} + {meter.written_tokens:,} tokens")
    if meter.cost is not None:
        parts.append(f"cost {meter.cost:.4f}")
    messages.say(", ".join(parts))
    if report.bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.bad.most_common())
        messages.say(f"replies that could not be used: {reasons}")
    if report.stopped:
        messages.say(f"stopped: {report.stopped}; --resume goes on with what is in -o FILE")
    if not report.made and report.bad and plan.protocol == "json":
        messages.say("--protocol plain asks in three short steps, which smaller models manage")
