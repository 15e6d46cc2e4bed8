"""The guard of one component: built at the first check, and every check announced to LlamaIndex."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.instrumentation.span import active_span_id
from pydantic import ValidationError

from llama_index_mllm_protector.events import send_events
from llama_index_mllm_protector.settings import GuardSettings
from mllm_protector_guard import (
    ConfigError,
    Guard,
    GuardError,
    GuardPolicy,
    GuardRecord,
    GuardResult,
    HarmfulAnswerError,
    Origin,
    Turn,
)

__all__ = ["Checked", "LazyGuard"]

_POLICY_FIELDS = frozenset(GuardPolicy.model_fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The verdict on one turn.

    Attributes:
        result: What was decided, and the text that may leave.
        record: The trace record of it, ready for JSON.
    """

    result: GuardResult
    record: dict[str, Any]


class LazyGuard:
    """The guard that the settings describe. Copies of it are the same object, so models are shared.

    Raises:
        ConfigError: A setting is unknown or out of range, or `guard` came with others.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings: dict[str, Any] = dict(settings)
        self._lock = threading.Lock()
        self._guard = _given_guard(self.settings)
        self._policy = _policy(self.settings)

    def __copy__(self) -> LazyGuard:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyGuard:
        return self

    @property
    def guard(self) -> Guard:
        """The guard, built now if it was not; one guard however many threads ask.

        Raises:
            CheckpointError: A model cannot be loaded.
        """
        if self._guard is None:
            with self._lock:
                if self._guard is None:
                    self._guard = self._build()
        return self._guard

    def check(self, turns: Sequence[Turn], *, rewrite: bool = True) -> list[Checked]:
        """The verdicts on the turns, same order, from one guard batch.

        Args:
            turns: What to judge.
            rewrite: False withholds what a detoxifying guard would rewrite.

        Raises:
            HarmfulAnswerError: A turn is harmful and the policy says `on_harm="raise"`.
            InferenceError: A model failed and the policy says `on_error="raise"`.
            CheckpointError: A model cannot be loaded.
        """
        if not turns:
            return []
        origins = _origins(turns)
        guard = self.guard if rewrite else _without_rewrites(self.guard)
        return self._announced(turns, origins, guard.check_batch(turns, origins=origins, return_exceptions=True))

    async def acheck(self, turns: Sequence[Turn], *, rewrite: bool = True) -> list[Checked]:
        """`check` with models loaded and run in a worker thread; the event loop stays free."""
        if not turns:
            return []
        origins = _origins(turns)
        if self._guard is None:
            await asyncio.to_thread(lambda: self.guard)
        guard = self.guard if rewrite else _without_rewrites(self.guard)
        verdicts = await guard.acheck_batch(turns, origins=origins, return_exceptions=True)
        return self._announced(turns, origins, verdicts)

    def _build(self) -> Guard:
        from mllm_protector_guard import load_guard  # torch comes with it

        others = {name: value for name, value in self.settings.items() if name not in _POLICY_FIELDS | {"guard"}}
        return load_guard(policy=self._policy, **others)

    def _announced(
        self, turns: Sequence[Turn], origins: Sequence[Origin], verdicts: Sequence[GuardResult | GuardError]
    ) -> list[Checked]:
        checked, failed, trace_content = [], None, self.guard.trace_content
        for turn, origin, verdict in zip(turns, origins, verdicts, strict=True):
            if isinstance(verdict, GuardError):
                failed = failed or verdict
            result = verdict.result if isinstance(verdict, HarmfulAnswerError) else verdict
            if isinstance(result, GuardResult):
                send_events(turn, result, trace_content=trace_content)
                record = GuardRecord.of(turn, result, origin=origin, trace_content=trace_content)
                checked.append(Checked(result=result, record=record.model_dump(mode="json", exclude_none=True)))
        if failed is not None:
            raise failed
        return checked


def _given_guard(settings: dict[str, Any]) -> Guard | None:
    unknown = sorted(settings.keys() - GuardSettings.__optional_keys__)
    if unknown:
        raise ConfigError(f"unknown settings {unknown!r}; there are {sorted(GuardSettings.__optional_keys__)!r}")
    guard = settings.get("guard")
    if guard is None:
        return None
    if not isinstance(guard, Guard):
        raise ConfigError(f"guard= takes a Guard, got {type(guard).__name__}")
    others = sorted(name for name, value in settings.items() if name != "guard" and value is not None)
    if others:
        raise ConfigError(f"guard= is ready as it is and excludes {others!r}; set them where the guard is made")
    return guard


def _policy(settings: dict[str, Any]) -> GuardPolicy:
    try:
        return GuardPolicy(**{name: value for name, value in settings.items() if name in _POLICY_FIELDS})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))!r}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"wrong settings: {wrong}") from error


def _without_rewrites(guard: Guard) -> Guard:
    if guard.policy.on_harm != "detoxify":
        return guard
    return guard.changed(on_harm="withhold")


def _origins(turns: Sequence[Turn]) -> list[Origin]:
    span_id = active_span_id.get()
    return [
        Origin(
            integration="llama_index",
            question_match="none" if turn.question is None else "explicit",
            run_id=span_id,
        )
        for turn in turns
    ]
