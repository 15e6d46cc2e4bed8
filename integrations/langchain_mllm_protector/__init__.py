"""The guard for LangChain: `chain | ProtectorGuard()`.

Importing this package changes nothing. The first `ProtectorGuard` that is built with `capture=True`
(the default) registers the question capture described in `langchain_mllm_protector.capture`.
"""

from __future__ import annotations

from mllm_protector_guard import MissingDependencyError

try:
    import langchain_core as _langchain_core  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError("langchain-core", "langchain") from error

from langchain_mllm_protector.guard import ProtectorGuard
from langchain_mllm_protector.tracing import ProtectorCallbackHandler

__all__ = ["ProtectorCallbackHandler", "ProtectorGuard"]
