"""Checkpoints of others, which have no `guard.json`: what they do not say must be said by the caller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mllm_protector_guard.errors import CheckpointError, ConfigError
from mllm_protector_guard.models.checkpoint import BaseReference, DetectorConfig, DetoxifierConfig

__all__ = ["foreign_detector", "foreign_detoxifier", "validated"]

C = TypeVar("C", DetectorConfig, DetoxifierConfig)

# Published with the paper: LoRA adapters whose base and template their own files do not tell.
_PUBLISHED_DETECTORS = {
    "renjiepi/protector_detector_3b_lora": {
        "base": "openlm-research/open_llama_3b_v2",
        "polarity": "harmless",
        "template": "protector",
    },
}
_PUBLISHED_DETOXIFIERS = {
    "renjiepi/mllm_protector_detoxifier": {"base": "lmsys/vicuna-7b-v1.5", "template": "protector"},
}
_UNKNOWN = {"revision": "unknown", "licence": "unknown"}


def foreign_detector(
    folder: Path, model: str, given: dict[str, Any], base_revision: str | None
) -> tuple[DetectorConfig, BaseReference | None]:
    """How to use a detector of others, and the base under it if it is a LoRA adapter.

    Args:
        folder: The checkpoint.
        model: What the caller calls it.
        given: The caller's `base`, `polarity`, `template` and `threshold`, as far as given.
        base_revision: Commit of the base on the hub.

    Raises:
        CheckpointError: The adapter's configuration cannot be read.
        ConfigError: Something is missing, does not apply, or is wrong.
    """
    settings: dict[str, Any] = {**_PUBLISHED_DETECTORS.get(model, {}), **given}
    base = _base_of_adapter(folder, settings.get("base"), base_revision)
    missing = [name for name in ("polarity", "template") if name not in settings]
    if missing:
        raise ConfigError(
            f"{model!r} has no guard.json: say {' and '.join(f'{name}=' for name in missing)} "
            "(polarity 'harmful' or 'harmless': what a high output means; "
            "template 'protector', 'chatml' or 'answer_only': how it reads a turn)"
        )
    fields: dict[str, Any] = {
        name: settings[name] for name in ("polarity", "template", "threshold") if name in settings
    }
    return validated(DetectorConfig, {"base": base or BaseReference(name=model), **fields, **_UNKNOWN}), base


def foreign_detoxifier(
    folder: Path, model: str, given: dict[str, Any], base_revision: str | None
) -> tuple[DetoxifierConfig, BaseReference | None]:
    """How to use a detoxifier of others, and the base under it if it is a LoRA adapter.

    Arguments and errors are those of `foreign_detector`, with `base` and `template` in `given`.
    """
    settings: dict[str, Any] = {**_PUBLISHED_DETOXIFIERS.get(model, {}), **given}
    base = _base_of_adapter(folder, settings.get("base"), base_revision)
    if "template" not in settings:
        raise ConfigError(f"{model!r} has no guard.json: say its template=, 'protector' or 'chatml'")
    fields: dict[str, Any] = {
        "base": base or BaseReference(name=model),
        "template": settings["template"],
        "max_new_tokens": 512,
    }
    return validated(DetoxifierConfig, {**fields, **_UNKNOWN}), base


def validated(kind: type[C], fields: dict[str, Any]) -> C:
    """A configuration from a caller's settings.

    Raises:
        ConfigError: A value is not allowed.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"wrong settings for a {kind.model_fields['kind'].default}: {problems}") from error


def _base_of_adapter(folder: Path, base: str | Path | None, revision: str | None) -> BaseReference | None:
    config = folder / "adapter_config.json"
    if not config.exists():
        if base is not None:
            raise ConfigError(
                f"base= is for LoRA adapters, and {str(folder)!r} has no adapter_config.json; leave it out"
            )
        return None
    if base is None:
        try:
            base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except KeyError:
            pass
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{str(config)!r} cannot be read ({type(error).__name__}). Copy the checkpoint folder again.",
                source=folder,
            ) from error
    if not base:
        raise ConfigError(f"the adapter in {str(folder)!r} does not name its base model; give base=")
    return BaseReference(name=str(base), revision=revision)
