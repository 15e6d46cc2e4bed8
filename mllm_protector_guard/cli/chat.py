"""Which chat model writes the rows of `data generate`, and how it is asked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from mllm_protector_guard.errors import ConfigError

if TYPE_CHECKING:
    from mllm_protector_guard.training.drafts import ChatModel, ProtocolName
    from mllm_protector_guard.training.endpoint import Meter

__all__ = ["ChatChoice", "as_fields"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatChoice:
    """The options that name a chat model and say how it is asked."""

    endpoint: str | None
    chat_model: str | None
    api_key_env: str | None
    body: dict[str, Any]
    timeout_s: float
    retries: int
    local: str | None
    device: str
    dtype: str
    offline: bool
    temperature: float
    max_tokens: int | None

    @property
    def protocol(self) -> ProtocolName:
        """How such a model is best asked."""
        return "plain" if self.local else "json"

    def settings(self) -> dict[str, Any]:
        """What decides on the rows. A query of the URL may be a secret and stays out."""
        return {
            "endpoint": self.endpoint and urlunsplit(urlsplit(self.endpoint)._replace(query="", fragment="")),
            "chat_model": self.chat_model,
            "local": self.local,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "body": self.body or None,
        }

    def load(self, meter: Meter) -> ChatModel:
        """The model, ready to be asked.

        Raises:
            ConfigError: The options contradict each other.
            CheckpointError: The local model cannot be found.
        """
        if (self.endpoint is None) == (self.local is None):
            raise ConfigError("give one of --endpoint URL and --local NAME")
        if self.local is None:
            return self._endpoint_chat(meter)
        if self.chat_model or self.api_key_env or self.body:
            raise ConfigError("--chat-model, --api-key-env and --body are for --endpoint")
        from mllm_protector_guard.models.chat import load_chat
        from mllm_protector_guard.training.generate import MeteredChat

        chat = load_chat(
            self.local,
            device=self.device,
            dtype=self.dtype,
            local_files_only=self.offline or None,
            temperature=self.temperature,
            max_new_tokens=self.max_tokens or 300,
        )
        return MeteredChat(chat, meter)

    def _endpoint_chat(self, meter: Meter) -> ChatModel:
        from pydantic import SecretStr

        from mllm_protector_guard.training.endpoint import EndpointChat

        if self.chat_model is None:
            raise ConfigError("--endpoint needs --chat-model NAME")
        key = None if self.api_key_env is None else os.environ.get(self.api_key_env)
        if self.api_key_env is not None and not key:
            raise ConfigError(f"the environment variable {self.api_key_env!r} of --api-key-env is empty or not set")
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens or 1200}
        return EndpointChat(
            self.endpoint or "",
            self.chat_model,
            api_key=SecretStr(key) if key else None,
            body={**sampling, **self.body},
            timeout_s=self.timeout_s,
            retries=self.retries,
            meter=meter,
        )


def as_fields(body: str | None) -> dict[str, Any]:
    """The further fields of each request, from JSON.

    Raises:
        ConfigError: It is no JSON object, or names a field that the command sets itself.
    """
    try:
        fields = json.loads(body or "{}")
    except ValueError as error:
        raise ConfigError("--body is not valid JSON") from error
    if not isinstance(fields, dict) or fields.keys() & {"model", "messages", "stream", "n"}:
        raise ConfigError("--body is a JSON object of further fields, without model, messages, stream and n")
    return fields
