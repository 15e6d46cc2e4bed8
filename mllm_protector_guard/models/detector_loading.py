"""Harm detectors brought into memory: ours, and sequence classifiers of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from mllm_protector_guard.errors import CheckpointError, ConfigError
from mllm_protector_guard.models.backbone import (
    attach_adapter,
    isolated,
    load_model,
    load_tokenizer,
    max_tokens,
    require_pad_token,
    resolve_base,
    tokenizer_home,
    with_adapter,
)
from mllm_protector_guard.models.checkpoint import (
    ADAPTER_FILE,
    HEAD_FILE,
    BaseReference,
    DetectorConfig,
    require_safetensors,
)
from mllm_protector_guard.models.layout import lay_out_by_column
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.models.pooling import PooledClassifier
from mllm_protector_guard.models.sharing import HeldBackbone, hold, low_rank_updates
from mllm_protector_guard.models.stream_scorer import can_stream

__all__ = ["LoadedDetector", "load_classifier", "load_pooled", "probabilities"]

_ADAPTER_HEADS = ("score", "classifier")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDetector:
    """A detector in memory.

    Attributes:
        max_tokens: Most tokens that it can read at once.
        harm_scores: From input_ids, attention_mask and answer_mask (see `PooledClassifier.forward`) to
            P(harmful), float [batch].
        pooled: The model under `harm_scores`, if it can score a growing answer without reading it anew.
        held: What a detoxifier on the same base shares while this detector is in memory.
    """

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    max_tokens: int
    harm_scores: Callable[[Tensor, Tensor, Tensor], Tensor]
    pooled: PooledClassifier | None = None
    held: HeldBackbone | None = None


def probabilities(logits: Tensor, config: DetectorConfig) -> Tensor:
    """P(harmful) of the head's logits, same shape."""
    sign = 1.0 if config.polarity == "harmful" else -1.0
    return torch.sigmoid(sign * logits / config.temperature)


def load_pooled(
    folder: Path, config: DetectorConfig, placement: Placement, *, local_files_only: bool | None
) -> LoadedDetector:
    """A detector in our format.

    Raises:
        CheckpointError: A part is missing, damaged, or does not fit the others.
    """
    require_safetensors(folder, HEAD_FILE, source=str(folder))
    base = resolve_base(config.base, local_files_only=local_files_only)
    tokenizer = load_tokenizer(base, padding_side="right")
    backbone, missing = load_model(AutoModel, base, placement, **_layers(config.layers))
    if missing:
        raise CheckpointError(
            f"the base model {config.base.name!r} lacks {len(missing)} weights of {config.layers or 'all its'} layers. "
            "Point `base` in guard.json to the right model, or pull it again.",
            source=folder,
        )
    held: HeldBackbone | None = None
    if (folder / ADAPTER_FILE).exists() or (folder / "adapter_config.json").exists():
        backbone = attach_adapter(backbone, folder)
        if placement.quantization is None:
            updates = low_rank_updates(backbone)
            backbone = backbone.merge_and_unload()
            # For the sake of a detoxifier that shares the weights.
            lay_out_by_column(backbone)
            held = hold(base, backbone, updates)
        backbone = backbone.eval()
    device = next(backbone.parameters()).device
    try:
        with isolated():
            model = PooledClassifier(
                backbone,
                hidden_size=backbone.config.hidden_size,
                pooling=config.pooling,
                peak_tokens=config.peak_tokens,
            )
            model.head.load_state_dict(load_file(folder / HEAD_FILE))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{HEAD_FILE} in {str(folder)!r} is damaged or no one-unit head on {backbone.config.hidden_size} features. "
            "Copy the checkpoint folder again, or check `base` and `layers` in guard.json.",
            source=folder,
        ) from error
    model.head.to(device)

    def harm_scores(input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
        return probabilities(model(input_ids, attention_mask, answer_mask), config)

    return LoadedDetector(
        tokenizer=tokenizer,
        device=device,
        max_tokens=max_tokens(backbone),
        harm_scores=harm_scores,
        pooled=model if can_stream(backbone) else None,
        held=held,
    )


def _layers(layers: int | None) -> dict[str, Any]:
    return {} if layers is None else {"num_hidden_layers": layers}


def load_classifier(
    folder: Path,
    config: DetectorConfig,
    placement: Placement,
    *,
    label: str | None,
    base: BaseReference | None,
    local_files_only: bool | None,
) -> LoadedDetector:
    """A sequence classifier of transformers: a whole checkpoint, or a LoRA adapter with its head on `base`.

    Args:
        folder: The checkpoint.
        config: Template, polarity and windows.
        placement: Device, dtype, quantization.
        label: Which label to read; may be None if there is only one.
        base: The model under an adapter.
        local_files_only: Fetch nothing.

    Raises:
        CheckpointError: The head was not in the checkpoint, or parts do not fit.
        ConfigError: The model has several labels and none is named.
    """
    root = folder if base is None else resolve_base(base, local_files_only=local_files_only)
    tokenizer = load_tokenizer(root if base is None else tokenizer_home(folder, root), padding_side="right")
    options: dict[str, Any] = {} if base is None else {"num_labels": 1}
    model, missing = load_model(AutoModelForSequenceClassification, root, placement, **options)
    if base is not None:
        _require_head_in_adapter(folder)
        model = with_adapter(model, folder, merge=placement.quantization is None)
        missing = {name for name in missing if name.split(".")[0] not in _ADAPTER_HEADS}
    if missing:
        raise CheckpointError(
            f"{str(root)!r} lacks the weights {sorted(missing)}; a fresh head would score at random. "
            "Give a checkpoint that was trained as a sequence classifier.",
            source=folder,
        )
    require_pad_token(tokenizer, model)
    model.config.pad_token_id = tokenizer.pad_token_id
    index = _label_index(model, label)

    def harm_scores(input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        one_of_many = logits.shape[-1] > 1 and model.config.problem_type != "multi_label_classification"
        scores = (logits.softmax(-1) if one_of_many else torch.sigmoid(logits / config.temperature))[:, index]
        return scores if config.polarity == "harmful" else 1.0 - scores

    return LoadedDetector(
        tokenizer=tokenizer, device=model.device, max_tokens=max_tokens(model), harm_scores=harm_scores
    )


def _require_head_in_adapter(folder: Path) -> None:
    require_safetensors(folder, ADAPTER_FILE, source=str(folder))
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            names: list[str] = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{ADAPTER_FILE} in {str(folder)!r} is damaged. Copy the checkpoint folder again.", source=folder
        ) from error
    if not any(part in _ADAPTER_HEADS for name in names for part in name.split(".")):
        raise CheckpointError(
            f"the adapter in {str(folder)!r} has no classification head; a fresh head would score at random. "
            "Save it with modules_to_save=['score'].",
            source=folder,
        )


def _label_index(model: PreTrainedModel, label: str | None) -> int:
    labels: dict[str, Any] = {str(name): int(index) for index, name in (model.config.id2label or {}).items()}
    if label is None and len(labels) == 1:
        return 0
    if label not in labels:
        raise ConfigError(f"name the label to read with label=; this model has {sorted(labels)}, got {label!r}")
    return int(labels[label])
