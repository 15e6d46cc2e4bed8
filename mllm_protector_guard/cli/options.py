"""Options that several commands have, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.policy import GuardPolicy

__all__ = [
    "BatchSize",
    "Detector",
    "DetectorPolarity",
    "DetectorTemplate",
    "Detoxifier",
    "DetoxifierTemplate",
    "Device",
    "Dtype",
    "Force",
    "Input",
    "Model",
    "Offline",
    "Output",
    "Resume",
    "Threshold",
    "as_policy",
    "as_source",
    "existing",
]

_FILES, _MODELS = "Files", "Models"
_NAMED = "name, folder, hub id, or `module:attribute` (an object, or a class or function that makes it)"


def existing(*names: str, **more: Any) -> Any:
    """An option that takes a file, or several, that must be there."""
    return typer.Option(*names, exists=True, dir_okay=False, **more)


Input = Annotated[
    Path,
    typer.Argument(
        metavar="[FILE|-]",
        help='JSON lines {"question", "answer", ...}, gzipped or not; - is standard input. '
        "A missing or null question is unknown.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write the rows here, not to standard output.", rich_help_panel=_FILES
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on where a run that wrote to -o FILE was killed; FILE.run.json has its settings.",
        rich_help_panel=_FILES,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Write over -o FILE.", rich_help_panel=_FILES)]
Model = Annotated[
    str,
    typer.Option("--model", metavar="NAME|DIR", help="The pair of models to use.", rich_help_panel=_MODELS),
]
Detector = Annotated[
    str | None,
    typer.Option("--detector", metavar="NAME|DIR|IMPORT", help=f"Another detector: {_NAMED}.", rich_help_panel=_MODELS),
]
Detoxifier = Annotated[
    str | None,
    typer.Option(
        "--detoxifier", metavar="NAME|DIR|IMPORT", help=f"Another detoxifier: {_NAMED}.", rich_help_panel=_MODELS
    ),
]
DetectorPolarity = Annotated[
    Literal["harmful", "harmless"] | None,
    typer.Option(
        "--detector-polarity", help="What a high output of a foreign detector means.", rich_help_panel=_MODELS
    ),
]
DetectorTemplate = Annotated[
    str | None,
    typer.Option(
        "--detector-template",
        metavar="NAME",
        help="How a foreign detector reads a turn: protector, chatml or answer_only.",
        rich_help_panel=_MODELS,
    ),
]
DetoxifierTemplate = Annotated[
    str | None,
    typer.Option(
        "--detoxifier-template",
        metavar="NAME",
        help="How a foreign detoxifier is asked: protector or chatml.",
        rich_help_panel=_MODELS,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        min=0.0,
        max=1.0,
        help="Harm scores at or above it are harmful. [default: the detector's own]",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows that go through a model together.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, mps, cuda or cuda:N.", rich_help_panel=_MODELS)]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODELS)]
Offline = Annotated[
    bool,
    typer.Option("--offline", help="Use only what is on this machine; never download.", rich_help_panel=_MODELS),
]


def as_source(path: Path) -> Path | None:
    """The path, or None when it is `-`, standard input.

    Raises:
        ConfigError: There is no such file.
    """
    if str(path) == "-":
        return None
    if not path.exists() or path.is_dir():
        raise ConfigError(f"{str(path)!r} is no file; give one, or - for standard input")
    return path


def as_policy(**fields: Any) -> GuardPolicy:
    """The policy that the options make.

    Raises:
        ConfigError: A value is out of range; the message names the option.
    """
    try:
        return GuardPolicy(**fields)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        names = (".".join(map(str, problem["loc"])).removesuffix("_s").replace("_", "-") for problem in problems)
        raise ConfigError(
            "; ".join(f"--{name}: {problem['msg']}" for name, problem in zip(names, problems, strict=True))
        ) from None
