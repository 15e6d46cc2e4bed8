"""The command `mllm-protector` and its parts."""

from __future__ import annotations

from typing import Annotated

import typer

from mllm_protector_guard import __version__
from mllm_protector_guard.cli import data, train
from mllm_protector_guard.cli.calibrate import calibrate
from mllm_protector_guard.cli.card import card
from mllm_protector_guard.cli.check import check
from mllm_protector_guard.cli.evaluate import evaluate
from mllm_protector_guard.cli.pull import pull
from mllm_protector_guard.cli.rewrite import rewrite
from mllm_protector_guard.cli.score import score

__all__ = ["app"]

app = typer.Typer(
    name="mllm-protector",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # their frames could show texts of users
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mllm-protector {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """A guard behind any chat model: scores answers, rewrites harmful ones, withholds what stays harmful."""


app.command()(pull)
app.command()(check)
app.command()(score)
app.command()(rewrite)
app.command()(evaluate)
app.command()(card)
app.command()(calibrate)
app.add_typer(train.app, name="train")
app.add_typer(data.app, name="data")
