"""The keyword settings that every class of this package takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict, TypeVar

from mllm_protector_guard import Detoxifier, Guard, HarmDetector, RecordSink

__all__ = ["GuardSettings", "documents_settings"]

T = TypeVar("T")


class GuardSettings(TypedDict, total=False):
    """Settings, all by keyword and all optional.

    guard: A ready `Guard`. It excludes every other setting.
    model: Name of a detector and detoxifier pair; "smollm2-135m" unless given.
    detector: Another detector than the pair's: a name, a folder, a hub id, or an object with `score`.
    detoxifier: Another detoxifier than the pair's: likewise, or an object with `rewrite`.
    threshold: Harm scores at or above it are harmful, [0, 1]; the detector's own when None.
    on_harm: "detoxify" (default), "withhold", "flag" or "raise".
    on_error: For what could not be judged: "withhold" (default), "raise" or "pass".
    max_attempts: How many rewrites are tried before the answer is withheld; 2.
    timeout_s: Time limit for one check in seconds; a batch of n has n times as long. None sets no limit.
    refusal: The text in the place of a withheld answer.
    device: "auto" (default), "cuda", "mps" or "cpu".
    dtype: "auto" (default), or a torch dtype by name.
    local_files_only: True never downloads; None leaves it to MLLM_PROTECTOR_OFFLINE.
    sinks: Take the record of every check, `JsonlSink` for one.
    trace_content: Whether records and events hold the texts themselves; False.
    """

    guard: Guard | None
    model: str | Path
    detector: str | Path | HarmDetector | None
    detoxifier: str | Path | Detoxifier | None
    threshold: float | None
    on_harm: Literal["detoxify", "withhold", "flag", "raise"]
    on_error: Literal["withhold", "raise", "pass"]
    max_attempts: int
    timeout_s: float | None
    refusal: str
    device: str
    dtype: str
    local_files_only: bool | None
    sinks: Sequence[RecordSink]
    trace_content: bool


def documents_settings(cls: type[T]) -> type[T]:
    """`cls` with the shared settings in its signature and docstring, where `help()` shows them."""
    given = inspect.signature(vars(cls)["__init__"])
    # Pydantic makes a signature of its own, without the settings.
    cls.__signature__ = given.replace(parameters=list(given.parameters.values())[1:])  # type: ignore[attr-defined]
    if cls.__doc__ and GuardSettings.__doc__:  # both are None under python -OO
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{inspect.cleandoc(GuardSettings.__doc__)}\n"
    return cls
