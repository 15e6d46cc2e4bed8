"""The settings of a guard for LangChain, and the engine that they stand for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseTransformOutputParser
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from langchain_mllm_protector.capture import enable_capture
from langchain_mllm_protector.cases import MissingQuestion, ToolCalls
from mllm_protector_guard import (
    DEFAULT_REFUSAL,
    ConfigError,
    Detoxifier,
    Guard,
    GuardPolicy,
    HarmDetector,
    load_guard,
)

__all__ = ["GuardSettings", "faults_of"]

_Tokens = Annotated[int, Field(strict=True, ge=1, le=999_999)]

# One lock for all guards; what it protects is quick, because models load at their first use.
_loading = threading.Lock()


class GuardSettings(BaseTransformOutputParser[Any]):
    """What `ProtectorGuard` is built with; its arguments are explained there."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True, populate_by_name=True)

    model: str | Path = "smollm2-135m"
    detector: HarmDetector | str | Path | None = None
    detoxifier: Detoxifier | str | Path | None = None
    guard: Guard | None = None
    threshold: float | None = None
    on_harm: Literal["detoxify", "withhold", "flag", "raise"] = "detoxify"
    on_error: Literal["withhold", "raise", "pass"] = "withhold"
    on_missing_question: MissingQuestion = "answer_only"
    tool_calls: ToolCalls = "judge"
    context_turns: int = Field(default=0, strict=True, ge=0, le=1_000)
    # Runnables have a method `stream`.
    stream_mode: Literal["sentence", "whole"] | _Tokens = Field(default="sentence", alias="stream")
    max_attempts: int = 2
    timeout_s: float | None = None
    refusal: str = DEFAULT_REFUSAL
    device: str = "auto"
    dtype: str = "auto"
    local_files_only: bool | None = None
    trace_content: bool = False
    capture: bool = True

    _loaded: Guard | None = PrivateAttr(default=None)

    if not TYPE_CHECKING:  # type checkers read the fields instead

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
                self._policy()
            except ValidationError as error:
                raise ConfigError(f"ProtectorGuard cannot be built: {faults_of(error)}") from error
            self._refuse_settings_beside_guard()
            if self.capture:
                enable_capture(self.context_turns)

    @property
    def InputType(self) -> Any:
        """What the guard takes: an answer, or a dict of question and answer."""
        return str | AIMessage | dict[str, Any] | list[Any] | BaseModel

    @property
    def OutputType(self) -> Any:
        """What the guard gives: the answer in the type it came in."""
        return str | AIMessage | dict[str, Any] | list[Any] | BaseModel

    def warm_up(self) -> None:
        """Loads the models now, not at the first check.

        Raises:
            CheckpointError: A model cannot be loaded.
        """
        self._engine().warm_up()

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """True: LangChain's `dumps` writes the settings, if they hold names and paths and no models."""
        return True

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """The settings for `dumps`; of a guard that holds models or a `Guard` only its class."""
        if self.guard is not None or not all(
            isinstance(m, str | Path | None) for m in (self.detector, self.detoxifier)
        ):
            return self.to_json_not_implemented()
        written = super().to_json()
        if written["type"] == "constructor":
            settings = written["kwargs"].items()
            written["kwargs"] = {name: str(value) if isinstance(value, Path) else value for name, value in settings}
        return written

    @property
    def _type(self) -> str:
        return "mllm_protector_guard"

    def __getstate__(self) -> dict[Any, Any]:
        """The settings without loaded models: a copy in another process loads its own."""
        return {**super().__getstate__(), "__pydantic_private__": {"_loaded": None}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restores the settings and the question capture."""
        super().__setstate__(state)
        if self.capture:
            enable_capture(self.context_turns)

    def _engine(self) -> Guard:
        """The guard that decides; its models load when they first score or write."""
        if self.guard is not None:
            return self.guard
        with _loading:
            if self._loaded is None:
                self._loaded = load_guard(
                    self.model,
                    detector=self.detector,
                    detoxifier=self.detoxifier,
                    policy=self._policy(),
                    trace_content=self.trace_content,
                    device=self.device,
                    dtype=self.dtype,
                    local_files_only=self.local_files_only,
                )
            return self._loaded

    def _refuse_settings_beside_guard(self) -> None:
        if self.guard is None:
            return
        free = {"guard", "name", "capture", "on_missing_question", "stream_mode", "tool_calls", "context_turns"}
        given = [
            name
            for name, field in type(self).model_fields.items()
            if name not in free and getattr(self, name) != field.default
        ]
        if given:
            raise ConfigError(
                f"guard= brings its own models and policy and contradicts {', '.join(map(repr, given))}. "
                "Set these where the Guard is built, or leave guard= out."
            )

    def _policy(self) -> GuardPolicy:
        return GuardPolicy(**{name: getattr(self, name) for name in GuardPolicy.model_fields})


def faults_of(error: ValidationError) -> str:
    """Each wrong setting and what is wrong with it, without the value."""
    return "; ".join(f"{'.'.join(map(str, e['loc'][:1]))}: {e['msg']}" for e in error.errors())
