"""Local models: the harm detectors and response detoxifiers that run on torch and transformers.

Importing this module loads neither; the first call of a `load_*` function does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakValueDictionary

from mllm_protector_guard.batching import BatchingDetector
from mllm_protector_guard.errors import CheckpointError, ConfigError
from mllm_protector_guard.guard import Guard
from mllm_protector_guard.models import catalog
from mllm_protector_guard.models.catalog import DEFAULT_MODEL
from mllm_protector_guard.models.checkpoint import CONFIG_FILE, DetectorConfig, DetoxifierConfig, read_config
from mllm_protector_guard.models.foreign import foreign_detector, foreign_detoxifier, validated
from mllm_protector_guard.models.placement import Placement, Quantization
from mllm_protector_guard.policy import GuardPolicy
from mllm_protector_guard.ports import Detoxifier, HarmDetector, RecordSink

if TYPE_CHECKING:
    from mllm_protector_guard.models.checkpoint import BaseReference
    from mllm_protector_guard.models.detector import TransformersDetector
    from mllm_protector_guard.models.detoxifier import TransformersDetoxifier

__all__ = ["DEFAULT_MODEL", "load_detector", "load_detoxifier", "load_guard"]

T = TypeVar("T")

# Two guards that name the same checkpoint and placement share one model while either of them lives.
_shared: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
_shared_lock = threading.Lock()


def load_detector(
    model: str | Path = DEFAULT_MODEL,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    quantization: Quantization | None = None,
    local_files_only: bool | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
    base_revision: str | None = None,
    label: str | None = None,
    polarity: Literal["harmful", "harmless"] | None = None,
    template: str | None = None,
    threshold: float | None = None,
) -> TransformersDetector:
    """A harm detector; its weights go into memory at the first score, once for all guards that name them.

    Three kinds of checkpoint are read: ours (a folder with `guard.json`), any
    `AutoModelForSequenceClassification` checkpoint, and a LoRA adapter with its head on a named base.

    Args:
        model: Catalog name, folder, or hub id.
        device: "auto" (cuda, mps, cpu) or a torch device name.
        dtype: "auto" (bfloat16 on cuda, float32 elsewhere) or a torch dtype name.
        device_map: Spreads the model over devices, as accelerate does.
        quantization: "8bit" or "4bit" through bitsandbytes, on CUDA only.
        local_files_only: True fetches nothing, as `MLLM_PROTECTOR_OFFLINE=1` does for all.
        revision: Commit of a hub checkpoint.
        base: The model under a foreign LoRA adapter; its `adapter_config.json` names it otherwise.
        base_revision: Commit of that base on the hub.
        label: Label to read, for foreign models with several.
        polarity: What a high output means, "harmful" or "harmless"; required for foreign models.
        template: Prompt template of a foreign model: "protector" (the paper's), "chatml", "answer_only".
        threshold: Score from which an answer is harmful, for foreign models; 0.5 when None.

    Raises:
        CheckpointError: The checkpoint cannot be found or is not a detector.
        ConfigError: A setting is missing or does not apply.

    Example:
        >>> from mllm_protector_guard import Turn, load_detector
        >>> detector = load_detector("smollm2-135m")
        >>> scores = detector.score([Turn(question="How do I bake bread?", answer="Mix flour, water, salt, yeast.")])
    """
    placement = Placement(device=device, dtype=dtype, device_map=device_map, quantization=quantization)
    foreign = {"base": base, "label": label, "polarity": polarity, "template": template, "threshold": threshold}
    given = {name: value for name, value in foreign.items() if value is not None}
    where = (_identity(model), placement, local_files_only, revision, base_revision)

    def make() -> TransformersDetector:
        return _make_detector(model, placement, given, revision, base_revision, local_files_only)

    return _share(("detector", *where, *sorted(given.items())), make)


def load_detoxifier(
    model: str | Path = DEFAULT_MODEL,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    quantization: Quantization | None = None,
    local_files_only: bool | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
    base_revision: str | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> TransformersDetoxifier:
    """A response detoxifier; its weights go into memory at the first rewrite, once for all guards that name them.

    Three kinds of checkpoint are read: ours (a folder with `guard.json`), any causal language model, and a
    LoRA adapter on a named base.

    Args:
        model: Catalog name, folder, or hub id.
        device: As for `load_detector`.
        dtype: As for `load_detector`.
        device_map: As for `load_detector`.
        quantization: As for `load_detector`.
        local_files_only: True fetches nothing, as `MLLM_PROTECTOR_OFFLINE=1` does for all.
        revision: Commit of a hub checkpoint.
        base: The model under a foreign LoRA adapter; its `adapter_config.json` names it otherwise.
        base_revision: Commit of that base on the hub.
        template: Prompt template of a foreign model, "protector" (the paper's) or "chatml"; required for those.
        max_new_tokens: Longest rewrite in tokens; the checkpoint's own limit when None.
        seed: Makes the sampling of attempts above 0 repeatable.

    Raises:
        CheckpointError: The checkpoint cannot be found or is not a detoxifier.
        ConfigError: A setting is missing or does not apply.
    """
    placement = Placement(device=device, dtype=dtype, device_map=device_map, quantization=quantization)
    given = {name: value for name, value in {"base": base, "template": template}.items() if value is not None}
    where = (_identity(model), placement, local_files_only, revision, base_revision)

    def make() -> TransformersDetoxifier:
        return _make_detoxifier(
            model, placement, given, revision, base_revision, local_files_only, max_new_tokens=max_new_tokens, seed=seed
        )

    return _share(("detoxifier", *where, max_new_tokens, seed, *sorted(given.items())), make)


def load_guard(
    model: str | Path = DEFAULT_MODEL,
    *,
    detector: HarmDetector | str | Path | None = None,
    detoxifier: Detoxifier | str | Path | None = None,
    policy: GuardPolicy | None = None,
    sinks: Sequence[RecordSink] = (),
    trace_content: bool = False,
    batching: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    local_files_only: bool | None = None,
) -> Guard:
    """A guard on local models.

    Args:
        model: Catalog name whose detector and detoxifier are taken where none is given.
        detector: Another detector: an object of the port, or a name, folder or hub id for `load_detector`.
        detoxifier: Another detoxifier, likewise.
        policy: What to do with a score; `GuardPolicy()` when None.
        sinks: Take a record of every check.
        trace_content: Whether records hold the texts themselves.
        batching: Whether checks that run at the same time share forward passes of the detector, as a server wants;
            for other settings than the default ones give `detector=BatchingDetector(load_detector(), ...)`.
        device: Of both models.
        dtype: Of both models.
        local_files_only: True fetches nothing, as `MLLM_PROTECTOR_OFFLINE=1` does for all.

    Raises:
        CheckpointError: A checkpoint cannot be found.
        ConfigError: Settings contradict each other.

    Example:
        >>> from mllm_protector_guard import GuardPolicy, Turn, load_guard
        >>> guard = load_guard(policy=GuardPolicy(on_harm="withhold"))
        >>> result = guard.check(Turn(question="How do I bake bread?", answer="Mix flour, water, salt and yeast."))
    """
    policy = policy or GuardPolicy()
    placement: dict[str, Any] = {"device": device, "dtype": dtype, "local_files_only": local_files_only}
    if detector is None or isinstance(detector, str | Path):
        detector = load_detector(detector or model, **placement)
    if batching and not isinstance(detector, BatchingDetector):
        detector = BatchingDetector(detector)
    if isinstance(detoxifier, str | Path) or (detoxifier is None and policy.on_harm == "detoxify"):
        detoxifier = load_detoxifier(detoxifier or model, **placement)
    return Guard(detector=detector, detoxifier=detoxifier, policy=policy, sinks=sinks, trace_content=trace_content)


def _make_detector(
    model: str | Path,
    placement: Placement,
    given: dict[str, Any],
    revision: str | None,
    base_revision: str | None,
    local_files_only: bool | None,
) -> TransformersDetector:
    from mllm_protector_guard.models.detector import TransformersDetector
    from mllm_protector_guard.models.detector_loading import load_classifier, load_pooled

    folder = _folder(model, "detector", revision, local_files_only)
    if (folder / CONFIG_FILE).exists():
        ours = _read_ours(folder, model, given)
        if not isinstance(ours, DetectorConfig):
            raise CheckpointError(f"{str(model)!r} is a detoxifier; use load_detoxifier", source=str(model))
        return TransformersDetector(
            ours, lambda: load_pooled(folder, ours, placement, local_files_only=local_files_only)
        )
    label = given.get("label")
    config, base = foreign_detector(folder, str(model), given, base_revision)
    return TransformersDetector(
        config,
        lambda: load_classifier(folder, config, placement, label=label, base=base, local_files_only=local_files_only),
    )


def _make_detoxifier(
    model: str | Path,
    placement: Placement,
    given: dict[str, Any],
    revision: str | None,
    base_revision: str | None,
    local_files_only: bool | None,
    *,
    max_new_tokens: int | None,
    seed: int,
) -> TransformersDetoxifier:
    from mllm_protector_guard.models.causal_lm import load_causal_lm
    from mllm_protector_guard.models.detoxifier import TransformersDetoxifier

    folder = _folder(model, "detoxifier", revision, local_files_only)
    if (folder / CONFIG_FILE).exists():
        ours = _read_ours(folder, model, given)
        if not isinstance(ours, DetoxifierConfig):
            raise CheckpointError(f"{str(model)!r} is a detector; use load_detector", source=str(model))
        config: DetoxifierConfig = ours
        base: BaseReference | None = ours.base
    else:
        config, base = foreign_detoxifier(folder, str(model), given, base_revision)
    if max_new_tokens is not None:
        config = validated(DetoxifierConfig, {**dict(config), "max_new_tokens": max_new_tokens})
    return TransformersDetoxifier(
        config, lambda: load_causal_lm(folder, base, placement, local_files_only=local_files_only), seed=seed
    )


def _share(key: Hashable, make: Callable[[], T]) -> T:
    with _shared_lock:
        found: T | None = _shared.get(key)
        if found is None:
            found = _shared[key] = make()
        return found


def _identity(model: str | Path) -> str:
    """The same for two spellings of a folder, another for one spelling seen from two working directories."""
    folder = Path(model).expanduser()
    return str(model) if str(model) in catalog.names() or not folder.is_dir() else str(folder.resolve())


def _folder(
    model: str | Path, kind: Literal["detector", "detoxifier"], revision: str | None, local_files_only: bool | None
) -> Path:
    if str(model) not in catalog.names():
        from mllm_protector_guard.models.backbone import resolve_folder

        return resolve_folder(str(model), revision=revision, local_files_only=local_files_only)
    entry = catalog.get(str(model))
    folder = entry.detector if kind == "detector" else entry.detoxifier
    if not folder.is_dir():
        raise CheckpointError(
            f"this installation lacks the {kind} of {str(model)!r}; install mllm-protector-guard again",
            source=str(model),
        )
    return folder


def _read_ours(folder: Path, model: str | Path, given: dict[str, Any]) -> DetectorConfig | DetoxifierConfig:
    if given:
        raise ConfigError(f"{str(model)!r} says these in its guard.json itself; leave out: {', '.join(sorted(given))}")
    return read_config(folder)
