"""Which detector and detoxifier a command uses, and where they run."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.ports import Detoxifier, HarmDetector

__all__ = ["ModelChoice"]

_IMPORT_STRING = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """The options of a command that name models.

    Attributes:
        model: Name or folder of a pair; stands in for what is not named on its own.
        detector: Name, folder, hub id, or import string `module:attribute`.
        detector_polarity: As in `load_detector`.
        detector_template: As in `load_detector`.
        detector_label: As in `load_detector`; an object that is imported has none.
        detoxifier: Name, folder, hub id, or import string.
        detoxifier_template: As in `load_detoxifier`.
        device: As in `load_detector`.
        dtype: As in `load_detector`.
        offline: Whether models may only be taken from this machine.
    """

    model: str
    detector: str | None = None
    detector_polarity: Literal["harmful", "harmless"] | None = None
    detector_template: str | None = None
    detector_label: str | None = None
    detoxifier: str | None = None
    detoxifier_template: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False

    def load_detector(self) -> HarmDetector:
        """The detector, not yet warm.

        Raises:
            ConfigError: The import string leads to nothing with a `score` method.
            CheckpointError: The model cannot be found.
        """
        name = self.detector or self.model
        if _IMPORT_STRING.fullmatch(name) and self.detector_label is None:
            return cast(HarmDetector, _imported(name, method="score"))
        from mllm_protector_guard import load_detector

        return load_detector(
            name,
            device=self.device,
            dtype=self.dtype,
            local_files_only=self.offline or None,
            label=self.detector_label,
            polarity=self.detector_polarity,
            template=self.detector_template,
        )

    def load_detoxifier(self) -> Detoxifier:
        """The detoxifier, not yet warm.

        Raises:
            ConfigError: The import string leads to nothing with a `rewrite` method.
            CheckpointError: The model cannot be found.
        """
        name = self.detoxifier or self.model
        if _IMPORT_STRING.fullmatch(name):
            return cast(Detoxifier, _imported(name, method="rewrite"))
        from mllm_protector_guard import load_detoxifier

        return load_detoxifier(
            name,
            device=self.device,
            dtype=self.dtype,
            local_files_only=self.offline or None,
            template=self.detoxifier_template,
        )

    def detector_settings(self) -> dict[str, str]:
        """What decides on the scores, for the record of a run; what is not given is left out."""
        return self._settings(
            detector=_identity(self.detector or self.model),
            detector_polarity=self.detector_polarity,
            detector_template=self.detector_template,
            detector_label=self.detector_label,
        )

    def detoxifier_settings(self) -> dict[str, str]:
        """What decides on the rewrites, likewise."""
        return self._settings(
            detoxifier=_identity(self.detoxifier or self.model), detoxifier_template=self.detoxifier_template
        )

    def _settings(self, **named: str | None) -> dict[str, str]:
        settings = {**named, "device": self.device, "dtype": self.dtype}
        return {name: value for name, value in settings.items() if value is not None}


def _imported(spec: str, *, method: str) -> Any:
    """The object named by `spec`, or what it returns when it is a class or a function."""
    module_name, _, path = spec.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{spec!r} cannot be imported ({type(error).__name__}: {error}). Name an importable 'module:attribute'; "
            "modules of the current folder are found too."
        ) from error
    if isinstance(found, type) or not hasattr(found, method):
        if not callable(found):
            raise ConfigError(f"{spec!r} has no {method}() method and cannot be called to make an object that has one")
        found = found()
    if not callable(getattr(found, method, None)):
        raise ConfigError(f"{spec!r} gives a {type(found).__name__}, which has no {method}() method")
    return found


def _identity(name: str) -> str:
    """The name; of a folder also a mark that changes when the files in it do."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    marks = [f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return f"{name}#{hashlib.sha256(os.fsencode(chr(10).join(marks))).hexdigest()[:16]}"
