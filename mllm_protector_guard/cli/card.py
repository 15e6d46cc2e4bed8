"""`mllm-protector card`: the figures of a model card, from the report of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mllm_protector_guard.cli.console import EXIT_FINDING, Messages, exit_codes
from mllm_protector_guard.cli.detectors import weights_sha256
from mllm_protector_guard.errors import ConfigError

if TYPE_CHECKING:
    from mllm_protector_guard.evaluation.report_json import ModelReport
    from mllm_protector_guard.models.checkpoint import DetectorConfig

__all__ = ["card"]

_README = "README.md"
_BEGIN, _END = "<!-- figures -->", "<!-- /figures -->"


def card(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a detector of ours.", exists=True, file_okay=False)
    ],
    evaluation: Annotated[
        Path,
        typer.Option(
            "--evaluation", metavar="FILE", help="What `evaluate -o FILE` wrote.", exists=True, dir_okay=False
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="What the report calls the model, if it has several with its weights.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if the card is not what the report says.")
    ] = False,
) -> None:
    """Write the figures of an evaluation into a model card.

    Fills README.md of the folder between the lines `<!-- figures -->` and `<!-- /figures -->`, and `metrics` of its
    guard.json. The report must be of these very weights and of the threshold in guard.json.

    Exit code: 0; 1 if --check finds another text or FILE is no report; 2 if the report is not of this model, or the
    card lacks the lines.
    """
    with exit_codes():
        from mllm_protector_guard.evaluation.report_json import read_report
        from mllm_protector_guard.evaluation.report_markdown import card_section
        from mllm_protector_guard.models.checkpoint import write_config

        config = _detector_config(folder)
        report = read_report(evaluation)
        model = _model_of(report.models, folder, config, name)
        readme = folder / _README
        before = _readme(readme)
        after = _filled(before, card_section(model, report.version), readme)
        wanted = config.model_copy(update={"metrics": _metrics(model)})
        stale = [path for path, same in ((_README, before == after), ("guard.json", config == wanted)) if not same]
        if check and stale:
            command = f"mllm-protector card {folder} --evaluation {evaluation}"
            Messages().say(f"{str(folder)!r}: {' and '.join(stale)} not as in the report; run `{command}`")
            raise typer.Exit(EXIT_FINDING)
        if _README in stale:
            readme.write_text(after, encoding="utf-8", newline="")
        if "guard.json" in stale:
            write_config(folder, wanted)


def _detector_config(folder: Path) -> DetectorConfig:
    from mllm_protector_guard.models.checkpoint import DetectorConfig, read_config

    config = read_config(folder)
    if not isinstance(config, DetectorConfig):
        raise ConfigError(f"{str(folder)!r} is a detoxifier; evaluations are of detectors")
    return config


def _model_of(models: list[ModelReport], folder: Path, config: DetectorConfig, name: str | None) -> ModelReport:
    """The one of the report that has the weights of the folder and its threshold."""
    found = [one for one in models if one.weights_sha256 == weights_sha256(folder) and name in (None, one.name)]
    if not found:
        named = "" if name is None else f" called {name!r}"
        raise ConfigError(f"the report has no model{named} with the weights of {str(folder)!r}; evaluate that folder")
    at_threshold = [one for one in found if one.threshold == config.threshold]
    if not at_threshold:
        raise ConfigError(
            f"the report was made at the threshold {found[0].threshold!r}, and guard.json says {config.threshold!r}; "
            "evaluate again without --threshold"
        )
    if len(at_threshold) > 1:
        names = ", ".join(repr(one.name) for one in at_threshold)
        raise ConfigError(f"the report has several models with these weights: {names}; choose one with --name")
    return at_threshold[0]


def _readme(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError(
            f"{str(path)!r} is not there; write the card, with the lines {_BEGIN} and {_END} where its figures go"
        ) from None


def _filled(readme: str, section: str, path: Path) -> str:
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end or _BEGIN in rest or _END in after:
        raise ConfigError(f"{str(path)!r} needs one line {_BEGIN} and, after it, one line {_END}; figures go between")
    return f"{before}{begin}\n{section.strip()}\n{end}{after}"


def _metrics(model: ModelReport) -> dict[str, dict[str, float]]:
    from mllm_protector_guard.evaluation.metrics import RATES

    return {
        one.name: {rate: round(value, 4) for rate in RATES if (value := getattr(one.metrics, rate)) is not None}
        for one in model.files
        if one.metrics.measured
    }
