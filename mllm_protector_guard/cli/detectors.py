"""The detectors of a comparison: which they are, and how each is to be read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from mllm_protector_guard.cli.choices import ModelChoice
from mllm_protector_guard.errors import ConfigError

__all__ = ["DetectorChoice", "choose_detectors", "weights_sha256"]

_SETTINGS = ("polarity", "label", "template", "threshold", "name")
_POLARITIES = ("harmful", "harmless")


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorChoice:
    """One detector of a comparison.

    Attributes:
        name: What reports call it.
        models: Where it is and how it is read.
        threshold: Scores at or above it count as harmful; None takes the detector's own.
    """

    name: str
    models: ModelChoice
    threshold: float | None = None

    def weights_sha256(self) -> str | None:
        """That of its checkpoint; see `weights_sha256`."""
        from mllm_protector_guard.models import catalog

        name = self.models.detector or self.models.model
        return weights_sha256(
            catalog.get(name).detector if name in catalog.names() else Path(name).expanduser(),
        )


def choose_detectors(
    detectors: Sequence[str],
    models: Sequence[str],
    *,
    threshold: float | None,
    shared: ModelChoice,
) -> list[DetectorChoice]:
    """The detectors named, in order, each with its own settings or else those of all.

    Args:
        detectors: `NAME` or `NAME,setting=value,...`; see `--detector`.
        models: Names or folders of pairs, whose detectors are meant. Without any detector, that of `shared.model`.
        threshold: Of detectors that do not say their own.
        shared: Polarity, label, template, device and dtype, likewise; the pairs of `models` have no label to choose.

    Raises:
        ConfigError: A setting is unknown or has no such value, or two detectors cannot be told apart.
    """
    own = replace(shared, detector_label=None)
    named = [(name, replace(own, model=name), dict[str, str]()) for name in models]
    for text in detectors:
        name, settings = _parsed(text)
        named.append((name, replace(shared, detector=name, **_reading(text, settings)), settings))
    if not named:
        named = [(shared.model, own, {})]
    choices = [
        DetectorChoice(
            name=settings.get("name") or _short(name),
            models=choice,
            threshold=_threshold(settings["threshold"]) if "threshold" in settings else threshold,
        )
        for name, choice, settings in named
    ]
    names = [one.name for one in choices]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"several detectors are called {', '.join(map(repr, twins))}; tell them apart: --detector FOLDER,name=..."
        )
    return choices


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 over the safetensors files of a checkpoint of ours, by name and content; None if it is none."""
    from mllm_protector_guard.models.checkpoint import CONFIG_FILE

    if not (folder / CONFIG_FILE).is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    """The name and the settings behind it; a path that is there is a name, whatever it looks like."""
    if Path(text).exists():
        return text, {}
    name, *parts = re.split(r",(?=[A-Za-z_]+=)", text)
    settings: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in _SETTINGS or not value or key in settings:
            raise ConfigError(
                f"--detector {text!r}: {part!r} is no setting. Behind the name may stand, parted by commas and each "
                f"once: {', '.join(f'{one}=...' for one in _SETTINGS)}"
            )
        settings[key] = value
    return name, settings


def _reading(text: str, settings: dict[str, str]) -> dict[str, Any]:
    reading: dict[str, Any] = {}
    if "polarity" in settings:
        if settings["polarity"] not in _POLARITIES:
            raise ConfigError(f"--detector {text!r}: polarity is harmful or harmless, what a high output means")
        reading["detector_polarity"] = cast(Literal["harmful", "harmless"], settings["polarity"])
    for name in ("template", "label"):
        if name in settings:
            reading[f"detector_{name}"] = settings[name]
    return reading


def _threshold(text: str) -> float:
    try:
        threshold = float(text)
    except ValueError:
        threshold = float("nan")
    if not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold={text} is no number in [0, 1]")
    return threshold


def _short(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name
