"""Local chat models: a causal language model that answers a list of messages through its own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models import catalog
from mllm_protector_guard.models.placement import Placement

if TYPE_CHECKING:
    from mllm_protector_guard.models.causal_lm import LoadedCausalLM

__all__ = ["LocalChat", "load_chat"]


def load_chat(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    local_files_only: bool | None = None,
    temperature: float = 0.8,
    max_new_tokens: int = 512,
) -> LocalChat:
    """A chat model in memory.

    Args:
        model: Catalog name (its base model is taken), folder, or hub id of a causal language model.
        device: As for `load_detector`.
        dtype: As for `load_detector`.
        local_files_only: True fetches nothing, as `MLLM_PROTECTOR_OFFLINE=1` does for all.
        temperature: Of the sampling; 0 decodes greedily.
        max_new_tokens: Longest reply in tokens.

    Raises:
        CheckpointError: The model cannot be found or is no causal language model.
        ConfigError: It has no chat template.
    """
    from mllm_protector_guard.models.backbone import resolve_folder
    from mllm_protector_guard.models.causal_lm import load_causal_lm
    from mllm_protector_guard.models.pull import ensure_base

    if str(model) in catalog.names():
        folder = ensure_base(str(model), local_files_only=local_files_only)
    else:
        folder = resolve_folder(str(model), revision=None, local_files_only=local_files_only)
    loaded = load_causal_lm(folder, None, Placement(device=device, dtype=dtype), local_files_only=local_files_only)
    if not loaded.tokenizer.chat_template:
        raise ConfigError(f"{str(model)!r} has no chat template; give a model that was trained to chat")
    return LocalChat(str(model), loaded, temperature=temperature, max_new_tokens=max_new_tokens)


class LocalChat:
    """Answers one chat at a time.

    Args:
        name: What the model is called.
        loaded: The model.
        temperature: Of the sampling; 0 decodes greedily.
        max_new_tokens: Longest reply in tokens.
    """

    def __init__(self, name: str, loaded: LoadedCausalLM, *, temperature: float, max_new_tokens: int) -> None:
        self.name = name
        self._loaded = loaded
        self._sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        self._max_new_tokens = max_new_tokens

    def reply(self, messages: Sequence[Mapping[str, str]], *, seed: int) -> str:
        """The reply; "" if it had not ended after `max_new_tokens` or does not fit into the model."""
        from mllm_protector_guard.models.backbone import max_tokens
        from mllm_protector_guard.models.causal_lm import generate

        tokenizer = self._loaded.tokenizer
        chat = [dict(message) for message in messages]
        prompt = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if len(ids) + self._max_new_tokens > max_tokens(self._loaded.model):
            return ""
        (text,) = generate(self._loaded, [ids], seed=seed, max_new_tokens=self._max_new_tokens, **self._sampling)
        return text or ""
