"""The Hugging Face Trainer for models of which only some weights are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.training.config import Recipe

__all__ = ["add_lora", "fit"]

_WEIGHTS_FILE = "trained.safetensors"


def add_lora(model: PreTrainedModel, recipe: Recipe, base_name: str) -> PeftModel:
    """The model with a fresh adapter; only the adapter can be trained."""
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.target_pattern(model.config.num_hidden_layers),
        base_model_name_or_path=base_name,
    )
    adapted = get_peft_model(model, config)
    # PEFT overwrites the name with the local path, which means nothing elsewhere.
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def fit(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
) -> None:
    """Trains the weights that require a gradient, with a progress bar; checkpoints go to `folder`.

    Args:
        model: Its forward takes what `collate` gives and returns a dict with `loss`.
        rows: Each has `input_ids`, by whose length rows are put together.
        collate: Makes a batch.
        recipe: Learning rate, steps, seed.
        folder: Where checkpoints are kept, one at a time.
        resume: Go on from the last checkpoint, if there is one.

    Raises:
        ConfigError: There are checkpoints of an earlier run and `resume` is False.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None and not resume:
        raise ConfigError(f"{str(folder)!r} holds an unfinished run; go on with resume, or choose another output")
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        gradient_checkpointing=recipe.gradient_checkpointing,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        num_train_epochs=recipe.epochs,
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
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
    _Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train(  # type: ignore[arg-type]
        resume_from_checkpoint=last
    )


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


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
