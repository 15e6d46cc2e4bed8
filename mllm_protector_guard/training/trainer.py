"""The Hugging Face Trainer for models of which only some weights are trained."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models.backbone import load_model
from mllm_protector_guard.models.checkpoint import (
    ADAPTER_FILE,
    CONFIG_FILE,
    DetectorConfig,
    DetoxifierConfig,
    write_config,
)
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.training.config import Recipe

__all__ = ["add_lora", "fit", "save_adapter"]

_WEIGHTS_FILE = "trained.safetensors"
_RUN = "run"
_STATE_FILE = "trainer_state.json"
# The argument changed its name within transformers 5.
_GROUP_BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
    else {"group_by_length": True}
)


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


def is_done(folder: Path, *, resume: bool) -> bool:
    """Whether the folder holds a finished checkpoint, which `resume` leaves as it is.

    Raises:
        ConfigError: It does, and `resume` is False.
    """
    done = (folder / CONFIG_FILE).exists()
    if done and not resume:
        raise ConfigError(f"{str(folder)!r} already holds a checkpoint; choose another output")
    return done


def load_whole(auto: Any, base: Path, **options: Any) -> PreTrainedModel:
    """The base model in float32, with every weight from its files.

    Raises:
        CheckpointError: It cannot be loaded.
        ConfigError: The recipe asks for more layers than it has.
    """
    model, missing = load_model(auto, base, Placement(dtype="float32"), **options)
    if missing:
        raise ConfigError(
            f"{str(base)!r} lacks {len(missing)} weights of the model that the recipe asks for: {options}"
        )
    return model


def finish(folder: Path, config: DetectorConfig | DetoxifierConfig) -> None:
    """Makes a checkpoint of the folder and drops what only the training needed."""
    write_config(folder, config)
    shutil.rmtree(folder / _RUN, ignore_errors=True)


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Writes the adapter as PEFT lays it out, in float16; its own writer would ask the hub about the base model."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    half = {name: w.detach().to("cpu", torch.float16).contiguous() for name, w in weights.items()}
    save_file(half, folder / ADAPTER_FILE)
    config = copy.copy(adapted.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def fit(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
) -> None:
    """Trains the weights that require a gradient, with a progress bar; unfinished work is kept in `folder/run`.

    Args:
        model: Its forward takes what `collate` gives and returns a dict with `loss`.
        rows: Each has `input_ids`, by whose length rows are put together.
        collate: Makes a batch.
        recipe: Learning rate, steps, seed.
        folder: Of the checkpoint that is made.
        resume: Go on from the last checkpoint, if there is one.

    Raises:
        ConfigError: There are checkpoints of an earlier run and `resume` is False.
    """
    run = folder / _RUN
    last = _last_checkpoint(run)
    if last is not None and not resume:
        raise ConfigError(f"{str(folder)!r} holds an unfinished run; go on with resume, or choose another output")
    arguments = TrainingArguments(
        output_dir=str(run),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        num_train_epochs=recipe.epochs,
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        **_GROUP_BY_LENGTH,
        remove_unused_columns=False,
        logging_steps=10,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to=[],
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    _Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train(resume_from_checkpoint=last)


class _Trainer(Trainer):
    """Keeps only the trained weights in checkpoints; the frozen ones come from the base model."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_trained(self.accelerator.unwrap_model(self.model)), folder / _WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(model or self.model)
        stored = load_file(Path(resume_from_checkpoint) / _WEIGHTS_FILE)
        if stored.keys() != _trained(target).keys():
            raise ConfigError(f"the run in {resume_from_checkpoint!r} trained other weights; do not change the recipe")
        target.load_state_dict(stored, strict=False)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; the trainer's state is what it writes last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_STATE_FILE}") if path.stat().st_size]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
