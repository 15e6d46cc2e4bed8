"""`mllm-protector train`: makes a detector or a detoxifier."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.console import exit_codes
from mllm_protector_guard.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Train a detector or a detoxifier. Needs the extra `train`.")

Recipe = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="A recipe of the package, or a YAML file.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the checkpoint.", file_okay=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run with the same output was stopped or killed.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe, as epochs=2 or lora.rank=8."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Never download the base model.")]


@app.command()
def detector(
    train: Annotated[
        list[Path],
        options.existing("--train", help='Lines of {"question", "answer", "harmful"}.'),
    ],
    dev: Annotated[
        list[Path],
        options.existing("--dev", help="The same; sets temperature and threshold, never trained on."),
    ],
    output: Output,
    recipe: Recipe = "adapt-detector",
    pairs: Annotated[
        list[Path] | None,
        options.existing(
            help='Lines of {"question", "rejected", "accepted"}, the answers that labels are for.',
        ),
    ] = None,
    labels: Annotated[
        list[Path] | None,
        options.existing(
            help='Lines of {"sha256", "harmful"}: labels of answers in --pairs, to train on.',
        ),
    ] = None,
    dev_labels: Annotated[
        list[Path] | None,
        options.existing(help="The same, for temperature and threshold."),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    offline: Offline = False,
) -> None:
    """Train a harm detector, calibrate it on the dev files, and print its folder.

    The folder serves as `--detector DIR` of the other commands. Give `--train`, `--dev`, `--pairs`,
    `--labels` and `--dev-labels` once a file.
    """
    with exit_codes(), _training_log():
        from mllm_protector_guard.training import DetectorRecipe, load_recipe, train_detector

        chosen = load_recipe(recipe, overrides=overrides or ())
        if not isinstance(chosen, DetectorRecipe):
            raise ConfigError(f"recipe {recipe!r} is for a {chosen.kind}")
        with redirect_stdout(sys.stderr):  # the trainer prints its losses
            folder = train_detector(
                chosen,
                train=train,
                dev=dev,
                pairs=pairs or (),
                labels=labels or (),
                dev_labels=dev_labels or (),
                output=output,
                resume=resume,
                local_files_only=offline or None,
            )
        _print_once(folder)


@app.command()
def detoxifier(
    train: Annotated[
        list[Path],
        options.existing("--train", help='Lines of {"question", "rejected", "accepted"}.'),
    ],
    output: Output,
    recipe: Recipe = "adapt-detoxifier",
    targets: Annotated[
        list[Path] | None,
        options.existing(
            help='Lines of {"sha256", "accepted"}: rewrites of harmful answers in --train or --answers.',
        ),
    ] = None,
    answers: Annotated[
        list[Path] | None,
        options.existing(
            help='Lines of {"question", "answer", "harmful"}: harmless ones are to come back unchanged.',
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    offline: Offline = False,
) -> None:
    """Train a response detoxifier and print its folder.

    The folder serves as `--detoxifier DIR` of the other commands. Give `--train`, `--targets` and
    `--answers` once a file.
    """
    with exit_codes(), _training_log():
        from mllm_protector_guard.training import DetoxifierRecipe, load_recipe, train_detoxifier

        chosen = load_recipe(recipe, overrides=overrides or ())
        if not isinstance(chosen, DetoxifierRecipe):
            raise ConfigError(f"recipe {recipe!r} is for a {chosen.kind}")
        with redirect_stdout(sys.stderr):
            folder = train_detoxifier(
                chosen,
                train=train,
                targets=targets or (),
                answers=answers or (),
                output=output,
                resume=resume,
                local_files_only=offline or None,
            )
        _print_once(folder)


def _print_once(folder: Path) -> None:
    """Prints the folder, in one of the processes of a run on several devices."""
    from mllm_protector_guard.training.trainer import is_main_process

    if is_main_process():
        print(folder)


@contextmanager
def _training_log() -> Iterator[None]:
    """Shows on standard error what the training says of its rows and its calibration."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger = logging.getLogger("mllm_protector_guard")
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
