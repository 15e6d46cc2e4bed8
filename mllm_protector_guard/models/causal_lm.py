"""Causal language models: loading one, and writing texts with it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mllm_protector_guard.errors import CheckpointError
from mllm_protector_guard.models.backbone import (
    load_model,
    load_tokenizer,
    require_pad_token,
    resolve_base,
    tokenizer_home,
    with_adapter,
)
from mllm_protector_guard.models.checkpoint import BaseReference
from mllm_protector_guard.models.layout import lay_out_by_column
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.models.sharing import find_held

__all__ = ["LoadedCausalLM", "generate", "load_causal_lm"]

# Sampling draws from torch's global generator; one generation at a time keeps a seed's text the same.
_GENERATOR_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCausalLM:
    """A causal LM in memory."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel


def load_causal_lm(
    folder: Path,
    base: BaseReference | None,
    placement: Placement,
    *,
    local_files_only: bool | None,
) -> LoadedCausalLM:
    """A causal LM: a whole checkpoint in `folder`, or a LoRA adapter in `folder` on `base`.

    The adapter's model stands on the layers of a detector in memory on the same base, where there is one in float32.

    Raises:
        CheckpointError: A part is missing, damaged, or does not fit.
    """
    root = folder if base is None else resolve_base(base, local_files_only=local_files_only)
    tokenizer = load_tokenizer(root if base is None else tokenizer_home(folder, root), padding_side="left")
    held = None if base is None else find_held(root, folder, placement)
    model, missing = load_model(AutoModelForCausalLM, root, placement, held=held)
    if missing:
        raise CheckpointError(
            f"{str(root)!r} lacks {len(missing)} weights of a causal language model. "
            "Give a checkpoint that was trained as one; a classifier is for load_detector.",
            source=root,
        )
    if base is not None:
        model = with_adapter(model, folder, merge=placement.quantization is None, held=held)
    lay_out_by_column(model)
    require_pad_token(tokenizer, model)
    # Of the checkpoint's own ways to generate, only its end counts: `generate` would take over the others unasked.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return LoadedCausalLM(tokenizer=tokenizer, model=model)


@torch.inference_mode()
def generate(
    loaded: LoadedCausalLM,
    prompts: list[list[int]],
    *,
    seed: int,
    max_new_tokens: int,
    end_of_turn: str | None = None,
    **decoding: Any,
) -> list[str | None]:
    """What the model writes after each prompt, same order; None where it had not ended after `max_new_tokens`.

    Args:
        loaded: The model.
        prompts: Token ids, at least one a prompt; they run as one batch.
        seed: Of the sampling; it leaves torch's own random numbers as they were.
        max_new_tokens: Longest text.
        end_of_turn: A token that ends a text besides the model's own.
        decoding: Further fields of `GenerationConfig`.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    stops = _stop_tokens(loaded, end_of_turn)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, **decoding
    )
    input_ids, attention_mask = _left_padded(prompts, tokenizer.pad_token_id, model.device)
    with _GENERATOR_LOCK, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=attention_mask, generation_config=settings
        )
    return [_finished_text(row, stops, tokenizer) for row in output[:, input_ids.shape[1] :].tolist()]


def _stop_tokens(loaded: LoadedCausalLM, end_of_turn: str | None) -> list[int]:
    configured = loaded.model.generation_config.eos_token_id
    stops = {loaded.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    if end_of_turn is not None:
        stops.add(loaded.tokenizer.convert_tokens_to_ids(end_of_turn))
    return sorted(stop for stop in stops if stop is not None)


def _left_padded(prompts: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _finished_text(row: list[int], stops: list[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text before the first stop token; None if there is none, for then the text broke off."""
    end = next((i for i, token in enumerate(row) if token in stops), None)
    return None if end is None else str(tokenizer.decode(row[:end], skip_special_tokens=True)).strip()
