"""A guard behind any chat model: scores answers, rewrites harmful ones, withholds what stays harmful."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_protector_guard.batching import BatchingDetector
from mllm_protector_guard.errors import (
    CheckpointError,
    CheckTimeoutError,
    ConfigError,
    DataError,
    DetectorBusyError,
    DetectorError,
    DetoxifierError,
    GuardError,
    HarmfulAnswerError,
    InferenceError,
    MissingDependencyError,
)
from mllm_protector_guard.guard import Guard
from mllm_protector_guard.guarded_stream import AsyncGuardedStream, GuardedStream
from mllm_protector_guard.policy import DEFAULT_REFUSAL, GuardPolicy
from mllm_protector_guard.ports import Detoxifier, HarmDetector, RecordSink, StreamingDetector, StreamScorer
from mllm_protector_guard.streaming import StreamPolicy
from mllm_protector_guard.tracing import GuardRecord, JsonlSink
from mllm_protector_guard.types import GuardResult, ImageInput, Origin, Outcome, Reason, RewriteAttempt, Turn

if TYPE_CHECKING:
    from mllm_protector_guard.models import load_detector, load_detoxifier, load_guard

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_REFUSAL",
    "AsyncGuardedStream",
    "BatchingDetector",
    "CheckTimeoutError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DetectorBusyError",
    "DetectorError",
    "Detoxifier",
    "DetoxifierError",
    "Guard",
    "GuardError",
    "GuardPolicy",
    "GuardRecord",
    "GuardResult",
    "GuardedStream",
    "HarmDetector",
    "HarmfulAnswerError",
    "ImageInput",
    "InferenceError",
    "JsonlSink",
    "MissingDependencyError",
    "Origin",
    "Outcome",
    "Reason",
    "RecordSink",
    "RewriteAttempt",
    "StreamPolicy",
    "StreamScorer",
    "StreamingDetector",
    "Turn",
    "__version__",
    "load_detector",
    "load_detoxifier",
    "load_guard",
]

_FROM_MODELS = frozenset({"load_detector", "load_detoxifier", "load_guard"})


def __getattr__(name: str) -> Any:
    # Torch and transformers load with the first model, not with the package.
    if name in _FROM_MODELS:
        from mllm_protector_guard import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
