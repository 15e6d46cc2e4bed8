"""Records of checks and the places they go to."""

from mllm_protector_guard.tracing.jsonl import JsonlSink
from mllm_protector_guard.tracing.record import GuardRecord

__all__ = ["GuardRecord", "JsonlSink"]
