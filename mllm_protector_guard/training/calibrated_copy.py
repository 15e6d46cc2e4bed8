"""Copies a detector's checkpoint with another temperature and threshold; the original is never written to."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import mllm_protector_guard
from mllm_protector_guard.errors import CheckpointError, ConfigError
from mllm_protector_guard.models import catalog
from mllm_protector_guard.models.backbone import resolve_folder
from mllm_protector_guard.models.checkpoint import (
    CONFIG_FILE,
    CalibrationRecord,
    DetectorConfig,
    read_config,
    write_config,
)

__all__ = ["calibrated", "detector_folder", "read_detector_config", "require_free", "write_copy"]

_CARD = "README.md"
_SECTION = "\n## Calibration of this copy\n"
_SUFFIX = "+calibrated."


def detector_folder(name: str, *, local_files_only: bool | None) -> Path | None:
    """The folder of a detector in our format; None for any other detector.

    Args:
        name: As for `load_detector`, or an import string.
        local_files_only: True fetches nothing.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    if name in catalog.names():
        return catalog.get(name).detector
    if ":" in name and not Path(name).expanduser().is_dir():
        return None
    folder = resolve_folder(name, revision=None, local_files_only=local_files_only)
    return folder if (folder / CONFIG_FILE).exists() else None


def read_detector_config(folder: Path) -> DetectorConfig:
    """`guard.json` of a detector.

    Raises:
        CheckpointError: It cannot be read, or is of a detoxifier.
    """
    config = read_config(folder)
    if not isinstance(config, DetectorConfig):
        raise CheckpointError(f"{str(folder)!r} holds a detoxifier; name a detector", source=folder)
    return config


def require_free(source: Path, output: Path, *, force: bool) -> None:
    """Passes if a copy of `source` may be written to `output`.

    Args:
        source: Folder of the checkpoint.
        output: Folder of the copy.
        force: Whether a checkpoint that is there may be replaced.

    Raises:
        ConfigError: It may not.
    """
    place, origin = output.expanduser().resolve(), source.resolve()
    package = Path(mllm_protector_guard.__file__).resolve().parent
    if place.is_relative_to(origin) or origin.is_relative_to(place):
        raise ConfigError(f"{str(output)!r} and the checkpoint that is calibrated overlap; give another --output")
    if place.is_relative_to(package):
        raise ConfigError(f"{str(output)!r} lies in the installed package, which an update replaces; give another")
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not force:
        raise ConfigError(f"{str(output)!r} exists; give another --output, or --force to replace the checkpoint in it")
    if not (place / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{str(output)!r} holds no {CONFIG_FILE}, and --force replaces checkpoints only; give another"
        )


def calibrated(config: DetectorConfig, *, threshold: float, factor: float, record: CalibrationRecord) -> DetectorConfig:
    """The config with a new threshold and temperature, a revision of its own, and the record.

    Measured figures that depend on the threshold are left out, because they do not hold any more.

    Args:
        config: Of the original.
        threshold: The new one, in (0, 1).
        factor: Multiplies the temperature.
        record: How both were found.
    """
    temperature = config.temperature * factor
    mark = hashlib.sha256(f"{threshold!r} {temperature!r} {record.model_dump_json()}".encode()).hexdigest()[:8]
    still_true = {name: {"auroc": rates["auroc"]} for name, rates in config.metrics.items() if "auroc" in rates}
    return DetectorConfig.model_validate(
        {
            **dict(config),
            "threshold": threshold,
            "temperature": temperature,
            "revision": config.revision.partition(_SUFFIX)[0] + _SUFFIX + mark,
            "metrics": still_true,
            "calibration": record,
        }
    )


def write_copy(source: Path, output: Path, config: DetectorConfig, *, force: bool) -> None:
    """Writes all files of `source` to `output`, with `config` as its `guard.json`; whole or not at all.

    Raises:
        ConfigError: `output` may not be written, see `require_free`.
        OSError: A file cannot be read or written.
    """
    require_free(source, output, force=force)
    place = output.expanduser().resolve()
    part, old = (place.with_name(f".{place.name}.{end}") for end in ("part", "old"))
    for left_over in (part, old):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        for path in sorted(source.rglob("*")):
            if path.is_file():
                target = part / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)  # without its mode: an installed package may be read-only
        write_config(part, config)
        _amend_card(part / _CARD, config)
        if place.exists():
            place.rename(old)
        part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _amend_card(card: Path, config: DetectorConfig) -> None:
    """Says in the model card, if there is one, that its figures are of another threshold."""
    if not card.is_file():
        return
    figures = card.read_bytes().partition(_SECTION.encode())[0].rstrip(b"\n")
    section = (
        f"\n{_SECTION}\nRevision {config.revision}: `mllm-protector calibrate` set the threshold to "
        f"{config.threshold:.4g} and the temperature to\n{config.temperature:.4g}; `calibration` in `{CONFIG_FILE}` "
        "says how. The figures above that depend on a threshold are those of\nthe original and do not hold here.\n"
    )
    card.write_bytes(figures + section.encode())
