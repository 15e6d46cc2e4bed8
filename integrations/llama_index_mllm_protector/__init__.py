"""The guard in LlamaIndex: over the answers of a query engine, and over the nodes it retrieves.

`ProtectorQueryEngine` wraps any query engine and guards what it answers; `ProtectorPostprocessor` goes
among the node postprocessors and guards what is retrieved. They can be used together.
"""

from __future__ import annotations

from mllm_protector_guard import MissingDependencyError

try:
    import llama_index.core  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "llama_index":
        raise  # llama-index-core is there, and something that it needs is not
    raise MissingDependencyError("llama-index-core", "llama-index") from error

from llama_index_mllm_protector.events import ProtectorRewriteEvent, ProtectorScoreEvent
from llama_index_mllm_protector.postprocessor import ProtectorPostprocessor
from llama_index_mllm_protector.query_engine import ProtectorQueryEngine

__all__ = ["ProtectorPostprocessor", "ProtectorQueryEngine", "ProtectorRewriteEvent", "ProtectorScoreEvent"]
