"""Response detoxifiers on causal language models."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models.backbone import max_tokens
from mllm_protector_guard.models.causal_lm import LoadedCausalLM, generate
from mllm_protector_guard.models.checkpoint import DetoxifierConfig
from mllm_protector_guard.models.prompts import DETOXIFIER_TEMPLATES, encode, shorten_question, template
from mllm_protector_guard.types import Turn

__all__ = ["TransformersDetoxifier"]

logger = logging.getLogger(__name__)


class TransformersDetoxifier:
    """Implements the `Detoxifier` port; loads its model at the first rewrite, once.

    Attempt 0 is decoded greedily; later attempts are sampled, each with its own seed. An answer longer than
    `max_answer_tokens`, and a rewrite that has not ended after `max_new_tokens`, give "" (no rewrite). With
    `max_copied_tokens` no rewrite repeats a longer run of the prompt or of itself.

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
        load: Callable[[], LoadedCausalLM],
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
        self._loaded: LoadedCausalLM | None = None
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

    def _ready(self) -> LoadedCausalLM:
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

    def _prompt(self, turn: Turn, loaded: LoadedCausalLM) -> list[int]:
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

    def _generate(self, loaded: LoadedCausalLM, prompts: list[list[int]], attempt: int) -> list[str]:
        limit = self.config.max_copied_tokens
        texts = generate(
            loaded,
            prompts,
            seed=self.seed + attempt,
            max_new_tokens=self.config.max_new_tokens,
            end_of_turn=self._template.end_of_turn,
            no_repeat_ngram_size=None if limit is None else limit + 1,  # counts the prompt in
            **(self._sampling if attempt else {"do_sample": False}),
        )
        return [self._finished(text) for text in texts]

    def _finished(self, text: str | None) -> str:
        if text is None:
            logger.warning("a rewrite had not ended after %d tokens and is discarded", self.config.max_new_tokens)
            return ""
        return text
