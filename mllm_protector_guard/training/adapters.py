"""Adapters: added to a base model, started from a stored one, and written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models import catalog
from mllm_protector_guard.models.backbone import load_model
from mllm_protector_guard.models.checkpoint import (
    ADAPTER_FILE,
    BaseReference,
    DetectorConfig,
    DetoxifierConfig,
    read_config,
)
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.training.config import Recipe

__all__ = ["add_lora", "load_adapter_weights", "load_whole", "save_adapter", "starting_point"]


def load_whole(auto: Any, base: Path, *, bf16: bool, **options: Any) -> PreTrainedModel:
    """The base model with every weight from its files, in bfloat16 for mixed precision and else in float32.

    Only an adapter is trained, and PEFT keeps that in float32. Mixed precision would cast the frozen weights in every
    step; holding them in bfloat16 spares that, which on a CPU is a third of the time.

    Raises:
        CheckpointError: It cannot be loaded.
        ConfigError: The recipe asks for more layers than it has.
    """
    if not torch.cuda.is_available():
        options["attn_implementation"] = "eager"  # its backward pass is faster than the fused one's on a CPU
    model, missing = load_model(auto, base, Placement(device="cpu", dtype="bfloat16" if bf16 else "float32"), **options)
    if missing:
        raise ConfigError(
            f"{str(base)!r} lacks {len(missing)} weights of the model that the recipe asks for: {options}"
        )
    return model


def add_lora(model: PreTrainedModel, recipe: Recipe, base_name: str) -> PeftModel:
    """The model with a fresh adapter; only the adapter can be trained.

    Raises:
        ConfigError: The model has no such layers or modules.
    """
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.target_pattern(model.config.num_hidden_layers),
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"the recipe's lora.modules {list(recipe.lora.modules)} do not exist in {base_name!r}"
        ) from error
    # PEFT takes the local path for the name, which means nothing elsewhere.
    adapted.peft_config["default"].base_model_name_or_path = base_name
    if recipe.gradient_checkpointing:
        # The method changed its name within transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return adapted


def save_adapter(adapted: PeftModel, trained: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the adapter as PEFT lays it out, in float16; its own writer would ask the hub about the base model.

    Args:
        adapted: The model with the adapter.
        trained: The adapter's weights by their names in `adapted`; those in the model itself may be in parts on
            several devices.
        folder: Of the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(adapted, state_dict=dict(trained), save_embedding_layers=False)
    half = {name: w.detach().to("cpu", torch.float16).contiguous() for name, w in weights.items()}
    save_file(half, folder / ADAPTER_FILE)
    config = copy.copy(adapted.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def load_adapter_weights(adapted: Any, folder: Path) -> None:
    """Puts the stored adapter's weights into the fresh one.

    Raises:
        ConfigError: The adapter in the folder has other layers, modules or another rank.
    """
    stored = load_file(folder / ADAPTER_FILE)
    fresh = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if {name: w.shape for name, w in stored.items()} != {name: w.shape for name, w in fresh.items()}:
        raise ConfigError(f"the adapter in {str(folder)!r} has another rank or other layers than the recipe's lora")
    set_peft_model_state_dict(adapted, stored)


def starting_point(recipe: Recipe) -> tuple[Path, DetectorConfig | DetoxifierConfig]:
    """The folder and the settings of the checkpoint that `start_from` names.

    Raises:
        ConfigError: It is of another kind, or on another base or template than the recipe.
    """
    name = str(recipe.start_from)
    folder = getattr(catalog.get(name), recipe.kind) if name in catalog.names() else Path(name)
    config = read_config(folder)
    same = (
        config.kind == recipe.kind
        and config.template == recipe.template
        and _identity(config.base) == _identity(recipe.base)
    )
    if not same:
        raise ConfigError(f"start_from {name!r} is no {recipe.kind} on the base and template of this recipe")
    return folder, config


def _identity(base: BaseReference) -> tuple[str | None, ...]:
    return (base.sha256,) if base.sha256 else (base.name, base.revision)
