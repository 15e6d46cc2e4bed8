"""A chat model behind an OpenAI-compatible endpoint, and the meter that keeps a run within its budget."""

from __future__ import annotations

import email.utils
import http.client
import json
import logging
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, SecretStr, ValidationError

from mllm_protector_guard.errors import ConfigError, InferenceError
from mllm_protector_guard.training.drafts import Messages

__all__ = ["BudgetSpentError", "EndpointChat", "Meter"]

logger = logging.getLogger(__name__)

_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_WAIT_S = 300.0
_MOST_BYTES = 16 << 20


class BudgetSpentError(Exception):
    """No further request may be made; the message names the limit."""


class Meter:
    """Counts requests, tokens and money over all threads, and says when to stop.

    A limit is looked at before a request, so that replies which are then under way may still overrun `max_cost`.

    Args:
        max_requests: Requests that may be made, repeated ones too.
        max_cost: Money that may be spent, in the currency of the prices.
        price_in: Of a million prompt tokens.
        price_out: Of a million written tokens.

    Raises:
        ConfigError: There is a `max_cost` without both prices.
    """

    def __init__(
        self,
        *,
        max_requests: int | None = None,
        max_cost: float | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
    ) -> None:
        if max_cost is not None and (price_in is None or price_out is None):
            raise ConfigError("a highest cost needs the prices of a million tokens, --price-in and --price-out")
        self.requests = self.prompt_tokens = self.written_tokens = 0
        self._max_requests = max_requests
        self._max_cost = max_cost
        self._prices = None if price_in is None or price_out is None else (price_in, price_out)
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    @property
    def cost(self) -> float | None:
        """Money spent, by the usage that the endpoint tells; None without prices."""
        if self._prices is None:
            return None
        return (self.prompt_tokens * self._prices[0] + self.written_tokens * self._prices[1]) / 1e6

    def begin(self) -> None:
        """Counts a request that is about to be made.

        Raises:
            BudgetSpentError: It may not be made.
        """
        with self._lock:
            if self._stopped.is_set():
                raise BudgetSpentError("stopped")
            if self._max_requests is not None and self.requests >= self._max_requests:
                raise BudgetSpentError(f"the {self._max_requests:,} requests of --max-requests are made")
            if self._max_cost is not None and (self.cost or 0.0) >= self._max_cost:
                raise BudgetSpentError(f"the {self._max_cost:g} of --max-cost are spent")
            self.requests += 1

    def note(self, prompt_tokens: int | None, written_tokens: int | None) -> None:
        """Adds the usage of a reply.

        Raises:
            ConfigError: The endpoint does not tell it, and the cost is limited.
        """
        if prompt_tokens is None or written_tokens is None:
            if self._max_cost is not None:
                raise ConfigError("the endpoint tells no usage, so its cost is unknown; use --max-requests instead")
            return
        with self._lock:
            self.prompt_tokens += prompt_tokens
            self.written_tokens += written_tokens

    def pause(self, seconds: float) -> None:
        """Waits.

        Raises:
            BudgetSpentError: The run was stopped meanwhile.
        """
        if self._stopped.wait(seconds):
            raise BudgetSpentError("stopped")

    def stop(self) -> None:
        """Lets no further request begin, and ends all pauses."""
        self._stopped.set()


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection would take the API key to another host."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


class EndpointChat:
    """Asks `URL/chat/completions`, and again with growing pauses when the endpoint is busy or fails.

    Args:
        url: Base of the API, as `https://host/v1`.
        model: Its name there.
        api_key: Sent as a bearer token; never shown or logged.
        body: More fields of the request; null takes one out.
        timeout_s: Longest silence of the endpoint, seconds.
        retries: How often a failed request is repeated.
        backoff_s: The first pause, seconds; each further one is twice as long, up to a minute.
        meter: Counts every request.

    Raises:
        ConfigError: The URL cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: SecretStr | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = 120.0,
        retries: int = 6,
        backoff_s: float = 1.0,
        meter: Meter,
    ) -> None:
        form = "the endpoint is not of the form https://host/v1, without a name or password in it"
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ConfigError(form) from error
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigError(form)
        self.name = model
        self._url = urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/chat/completions", fragment=""))
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key.get_secret_value()}"
        self._body = dict(body or {})
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._meter = meter
        self._opener = urllib.request.build_opener(_NoRedirect)

    def reply(self, messages: Messages, *, seed: int) -> str:
        """The reply; "" if it was refused or cut off.

        Raises:
            InferenceError: The endpoint failed at every try.
            ConfigError: The endpoint refuses such requests altogether.
            BudgetSpentError: The meter lets no request through.
        """
        fields = {"model": self.name, "messages": list(messages), "seed": seed} | self._body
        content = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        problem = ""
        for attempt in range(self._retries + 1):
            self._meter.begin()
            try:
                return self._text(self._post(content))
            except urllib.error.HTTPError as error:
                with error:
                    problem, asked = f"status {error.code}", _retry_after(error.headers)
                if error.code not in _TRANSIENT:
                    raise ConfigError(
                        f"the endpoint refuses the request with status {error.code}; check --endpoint, --chat-model, "
                        "--api-key-env and --body"
                    ) from None
                if asked is not None and asked > _LONGEST_WAIT_S:
                    raise InferenceError(f"the endpoint wants no request for {asked:,.0f} s; go on later") from None
            except (OSError, http.client.HTTPException, ValidationError) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                problem, asked = type(reason).__name__, None
            logger.debug("request failed (%s), try %d", problem, attempt + 1)
            if attempt < self._retries:
                backoff = min(self._backoff_s * 2**attempt, 60.0)
                # Spread out, so that requests that failed together do not come back together.
                self._meter.pause(max(asked or 0.0, backoff * random.uniform(0.5, 1.0)))  # noqa: S311
        raise InferenceError(f"the endpoint failed {self._retries + 1} times in a row, at last with {problem}")

    def _post(self, content: bytes) -> bytes:
        request = urllib.request.Request(self._url, content, self._headers, method="POST")  # noqa: S310
        with self._opener.open(request, timeout=self._timeout_s) as response:
            received: bytes = response.read(_MOST_BYTES)
        return received

    def _text(self, received: bytes) -> str:
        completion = _Completion.model_validate_json(received)
        usage = completion.usage or _Usage()
        self._meter.note(usage.prompt_tokens, usage.completion_tokens)
        if not completion.choices:
            return ""
        choice = completion.choices[0]
        return "" if choice.finish_reason == "length" else choice.message.content or ""


def _retry_after(headers: Any) -> float | None:
    """Seconds from now that the header asks to wait, given as a number or as a date."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
