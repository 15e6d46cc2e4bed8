"""The Hugging Face Trainer for models of which only some weights are trained."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models.checkpoint import (
    CONFIG_FILE,
    DetectorConfig,
    DetoxifierConfig,
    write_config,
)
from mllm_protector_guard.training.config import Recipe
from mllm_protector_guard.training.weights import load_trained, trained_names, trained_weights

__all__ = [
    "finish",
    "fit",
    "is_done",
    "is_main_process",
    "wait_for_all",
]

logger = logging.getLogger(__name__)

_WEIGHTS_FILE = "trained.safetensors"
_RUN = "run"
_STATE_FILE = "trainer_state.json"


def is_done(folder: Path, *, resume: bool) -> bool:
    """Whether the folder holds a finished checkpoint, which `resume` leaves as it is.

    Raises:
        ConfigError: It does, and `resume` is False.
    """
    done = (folder / CONFIG_FILE).exists()
    if done and not resume:
        raise ConfigError(f"{str(folder)!r} already holds a checkpoint; choose another output")
    return done


def finish(folder: Path, config: DetectorConfig | DetoxifierConfig) -> None:
    """Makes a checkpoint of the folder and drops what only the training needed."""
    write_config(folder, config)
    shutil.rmtree(folder / _RUN, ignore_errors=True)


def is_main_process() -> bool:
    """False in the second and later processes of a run on several devices, which write nothing; ask after `fit`."""
    return not _in_parallel() or distributed.get_rank() == 0


def wait_for_all() -> None:
    """Returns when every process of a run on several devices has come here."""
    if _in_parallel():
        distributed.barrier()


def _in_parallel() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def fit(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
) -> dict[str, Tensor]:
    """Trains the weights that require a gradient, with a progress bar; unfinished work is kept in `folder/run`.

    Started by torchrun or `accelerate launch` it trains on all their devices, and every process gets here with the
    same rows.

    Args:
        model: Its forward takes what `collate` gives, and `num_items_in_batch`. It returns a dict with `loss`: sums
            over the batch, each divided by its part of `num_items_in_batch`, else of `totals`.
        rows: Each has `input_ids`, by whose length rows are put together.
        collate: Makes a batch. Its `totals`, float [sums], are what the loss of this batch alone is divided by.
        recipe: Learning rate, steps, seed.
        folder: Of the checkpoint that is made.
        resume: Go on from the last checkpoint, if there is one.

    Returns:
        The trained weights by their names in `model`, on the CPU; nothing in other processes than the main one.

    Raises:
        ConfigError: There is no row, there are checkpoints of an earlier run and `resume` is False, or the launcher's
            configuration cannot work.
    """
    if not rows:
        raise ConfigError("no row is left to train on; every answer is blank or too long for the recipe")
    run = folder / _RUN
    last = _last_checkpoint(run)
    if last is not None and not resume:
        raise ConfigError(f"{str(folder)!r} holds an unfinished run; go on with resume, or choose another output")
    trainer = _Trainer(model=model, args=_arguments(run, recipe), train_dataset=rows, data_collator=collate)
    _check_launch(trainer)
    trainer.train(resume_from_checkpoint=last)
    weights = trained_weights(_module(trainer.model))
    # The main process clears the run folder next, and others may still be writing to it.
    wait_for_all()
    return weights


def _arguments(run: Path, recipe: Recipe) -> TrainingArguments:
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
        remove_unused_columns=False,
        logging_steps=10,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to=[],
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        # The Trainer would split each batch among them, and `totals` and pairs are about whole batches.
        logger.warning("%d GPUs are here and one is used; start with accelerate launch to use all", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def _check_launch(trainer: Trainer) -> None:
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        raise ConfigError(
            "FSDP 1 cannot shard a bfloat16 base together with its float32 adapter; "
            "set fsdp_version: 2 in the configuration of accelerate"
        )
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ConfigError("ZeRO stage 3 is not supported; set zero_stage: 2, or shard the base with FSDP 2")


class _Trainer(Trainer):
    """The loss is a mean over the whole step, the order of rows can be told, and checkpoints hold trained weights only.

    A step is made of all batches of a gradient accumulation on all devices. Frozen weights come from the base model.
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The next batches of a step, and their summed `totals`, which the model gets as `num_items_in_batch`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        totals = torch.stack([batch["totals"] for batch in batches]).sum(dim=0)
        return batches, self.accelerator.reduce(totals.to(device), reduction="sum")

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return _ByLength(
            [len(row["input_ids"]) for row in rows],
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            lambda: self.args.seed + int(self.state.epoch or 0),
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained weights; all processes must call this."""
        weights = trained_weights(_module(self.model))
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / _WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = _module(model or self.model)
        stored = load_file(Path(resume_from_checkpoint) / _WEIGHTS_FILE)
        if stored.keys() != trained_names(target):
            raise ConfigError(f"the run in {resume_from_checkpoint!r} trained other weights; do not change the recipe")
        load_trained(target, stored)


def _module(model: nn.Module | None) -> nn.Module:
    assert model is not None, "the Trainer always has a model"
    return model


class _ByLength(LengthGroupedSampler):
    """Rows of like length together, in an order that the seed alone decides.

    Processes that have drawn different random numbers before must still agree on it, and so must a resumed run with
    the one it goes on with.

    Args:
        lengths: Of all rows, in tokens.
        batch_size: Rows of a step, of all processes together.
        seed: Asked at the beginning of every epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed())
        return iter(super().__iter__())


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; the trainer's state is what it writes last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_STATE_FILE}") if path.stat().st_size]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
