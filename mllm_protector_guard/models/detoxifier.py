"""Response detoxifiers on causal language models."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mllm_protector_guard.errors import CheckpointError, ConfigError
from mllm_protector_guard.models.backbone import (
    load_model,
    load_tokenizer,
    max_tokens,
    require_pad_token,
    resolve_base,
    tokenizer_home,
    with_adapter,
)
from mllm_protector_guard.models.checkpoint import BaseReference, DetoxifierConfig
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.models.prompts import DETOXIFIER_TEMPLATES, encode, shorten_question, template
from mllm_protector_guard.types import Turn

__all__ = ["LoadedDetoxifier", "TransformersDetoxifier", "load_causal_lm"]

logger = logging.getLogger(__name__)

# Sampling draws from torch's global generator; one rewrite at a time keeps a seed's text the same.
_GENERATOR_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDetoxifier:
    """A causal LM in memory."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel


class TransformersDetoxifier:
    """Implements the `Detoxifier` port; loads its model at the first rewrite, once.

    Attempt 0 is decoded greedily; later attempts are sampled, each with its own seed. An answer longer than
    `max_answer_tokens`, and a rewrite that has not ended after `max_new_tokens`, give "" (no rewrite). With
    `max_copied_tokens` no rewrite repeats a longer run of the prompt.

    Args:
        config: Template and limits.
        load: Loads the model.
        temperature: Of the sampling of attempts above 0.
        top_p: Nucleus of the same sampling.
        seed: Makes sampling repeatable.
        batch_tokens: Upper bound on rows times tokens (prompt and rewrite) of one generation.
    """

    def __init__(
        self,
        config: DetoxifierConfig,
        load: Callable[[], LoadedDetoxifier],
        *,
        temperature: float = 0.7,
        top_p: float = 0.9,
        seed: int = 0,
        batch_tokens: int = 8192,
    ) -> None:
        self.config = config
        self.seed = seed
        self._template = template(config.template, DETOXIFIER_TEMPLATES)
        self._load = load
        self._loaded: LoadedDetoxifier | None = None
        self._lock = threading.Lock()
        self._sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        self._batch_tokens = batch_tokens

    def warm_up(self) -> None:
        """Loads the model, if it is not loaded yet.

        Raises:
            CheckpointError: It cannot be loaded.
        """
        self._ready()

    def rewrite(self, turns: Sequence[Turn], *, attempt: int = 0) -> list[str]:
        """One harmless answer per turn, same order; "" where none could be written.

        Raises:
            CheckpointError: The model cannot be loaded.
        """
        loaded = self._ready()
        prompts = [self._prompt(turn, loaded) for turn in turns]
        rewrites = [""] * len(turns)
        for batch in self._batches(prompts):
            for index, text in zip(batch, self._generate(loaded, [prompts[i] for i in batch], attempt), strict=True):
                rewrites[index] = text
        return rewrites

    def _ready(self) -> LoadedDetoxifier:
        with self._lock:
            if self._loaded is None:
                loaded = self._load()
                end = self._template.end_of_turn
                if end is not None and end not in loaded.tokenizer.get_vocab():
                    raise ConfigError(
                        f"template {self.config.template!r} ends a rewrite with {end!r}, which the tokenizer of "
                        f"{self.config.base.name!r} does not have; use template='protector' or a model trained with it"
                    )
                self._loaded = loaded
            return self._loaded

    def _prompt(self, turn: Turn, loaded: LoadedDetoxifier) -> list[int]:
        """Token ids of the prompt; none if the harmful answer is too long to be read whole and rewritten."""
        encoded = encode(turn, self._template, loaded.tokenizer)
        prefix = shorten_question(encoded.prefix, self.config.max_question_tokens)
        room = max_tokens(loaded.model) - len(prefix) - len(encoded.suffix) - self.config.max_new_tokens
        limit = min(self.config.max_answer_tokens, room)
        if len(encoded.answer) > limit:
            logger.warning("an answer of %d tokens is not rewritten; at most %d are", len(encoded.answer), limit)
            return []
        return [*prefix, *encoded.answer, *encoded.suffix]

    def _batches(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        batch: list[int] = []
        written = [i for i, prompt in enumerate(prompts) if prompt]
        for index in sorted(written, key=lambda i: len(prompts[i])):
            length = len(prompts[index]) + self.config.max_new_tokens
            if batch and (len(batch) + 1) * length > self._batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.inference_mode()
    def _generate(self, loaded: LoadedDetoxifier, prompts: list[list[int]], attempt: int) -> list[str]:
        tokenizer, model = loaded.tokenizer, loaded.model
        stops, limit = _stop_tokens(loaded, self._template.end_of_turn), self.config.max_copied_tokens
        settings = GenerationConfig(
            max_new_tokens=self.config.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
            # Of a model without an encoder, transformers takes the prompt for the encoder's input.
            encoder_no_repeat_ngram_size=None if limit is None else limit + 1,
            **(self._sampling if attempt else {"do_sample": False}),
        )
        input_ids, attention_mask = _left_padded(prompts, tokenizer.pad_token_id, model.device)
        with _GENERATOR_LOCK, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.seed + attempt)
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids, attention_mask=attention_mask, generation_config=settings
            )
        return [_finished_text(row, stops, tokenizer) for row in output[:, input_ids.shape[1] :].tolist()]


def _stop_tokens(loaded: LoadedDetoxifier, end_of_turn: str | None) -> list[int]:
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


def _finished_text(row: list[int], stops: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text before the first stop token; "" if there is none, for then the text broke off."""
    end = next((i for i, token in enumerate(row) if token in stops), None)
    if end is None:
        logger.warning("a rewrite had not ended after %d tokens and is discarded", len(row))
        return ""
    return str(tokenizer.decode(row[:end], skip_special_tokens=True)).strip()


def load_causal_lm(
    folder: Path,
    base: BaseReference | None,
    placement: Placement,
    *,
    local_files_only: bool | None,
) -> LoadedDetoxifier:
    """A causal LM: a whole checkpoint in `folder`, or a LoRA adapter in `folder` on `base`.

    Raises:
        CheckpointError: A part is missing, damaged, or does not fit.
    """
    root = folder if base is None else resolve_base(base, local_files_only=local_files_only)
    tokenizer = load_tokenizer(root if base is None else tokenizer_home(folder, root), padding_side="left")
    model, missing = load_model(AutoModelForCausalLM, root, placement)
    if missing:
        raise CheckpointError(
            f"{str(root)!r} lacks {len(missing)} weights of a causal language model. "
            "Give a checkpoint that was trained as one; a classifier is for load_detector.",
            source=root,
        )
    if base is not None:
        model = with_adapter(model, folder, merge=placement.quantization is None)
    require_pad_token(tokenizer, model)
    # Of the checkpoint's own ways to generate, only its end counts: `generate` would take over the others unasked.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return LoadedDetoxifier(tokenizer=tokenizer, model=model)
