"""The guard for LangChain: behind a chain, around a chat model, inside an agent.

Importing this package changes nothing. The first `ProtectorGuard` that is built with `capture=True`
(the default) registers the question capture described in `langchain_mllm_protector.capture`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_protector_guard import MissingDependencyError

try:
    import langchain_core as _langchain_core  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError("langchain-core", "langchain") from error

from langchain_mllm_protector.chat_model import ProtectedChatModel
from langchain_mllm_protector.guard import ProtectorGuard
from langchain_mllm_protector.tracing import ProtectorCallbackHandler

if TYPE_CHECKING:
    from langchain_mllm_protector.middleware import ProtectorMiddleware as ProtectorMiddleware

# Without ProtectorMiddleware: a star import must not need the optional package that it stands on.
__all__ = ["ProtectedChatModel", "ProtectorCallbackHandler", "ProtectorGuard"]


def __getattr__(name: str) -> Any:
    if name == "ProtectorMiddleware":
        from langchain_mllm_protector.middleware import ProtectorMiddleware

        return ProtectorMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
