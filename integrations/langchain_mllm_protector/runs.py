"""The run of a guarded chat model, as its checks report to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForChainRun,
    BaseCallbackHandler,
    CallbackManager,
    CallbackManagerForChainRun,
)
from langchain_core.callbacks.manager import BaseRunManager

__all__ = ["Call", "RunWatch", "parent_run"]

RunManager = TypeVar("RunManager", CallbackManagerForChainRun, AsyncCallbackManagerForChainRun)


def parent_run(kind: type[RunManager], run: BaseRunManager | None) -> RunManager:
    """`run` as one that may have child runs, which LangChain gives to chains only; one without handlers for None."""
    if run is None:
        return kind.get_noop_manager()
    return kind(
        run_id=run.run_id,
        handlers=run.handlers,
        inheritable_handlers=run.inheritable_handlers,
        parent_run_id=run.parent_run_id,
        tags=run.tags,
        inheritable_tags=run.inheritable_tags,
        metadata=run.metadata,
        inheritable_metadata=run.inheritable_metadata,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What the copy of a model that serves one call knows of it.

    Attributes:
        run: Gives the run of the call, once it has started.
        opened: Told of the chunks of a stream, which are to be closed before the run ends.
    """

    run: Callable[[], BaseRunManager | None] = lambda: None
    opened: Callable[[Any], object] = lambda chunks: None


class RunWatch(BaseCallbackHandler):
    """Knows the run that starts with `callbacks`: LangChain tells a streaming model nothing of its run.

    Args:
        callbacks: What the run will be configured with; the watch joins its handlers.

    Attributes:
        run: The run, once it has started.
    """

    # Inline, so that an asynchronous run is known before its model is asked.
    run_inline = True

    def __init__(self, callbacks: CallbackManager | AsyncCallbackManager) -> None:
        self.run: BaseRunManager | None = None
        self._callbacks = callbacks
        callbacks.add_handler(self, inherit=False)

    def on_chat_model_start(
        self,
        serialized: Any,
        messages: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the run down."""
        self.run = BaseRunManager(
            run_id=run_id,
            handlers=self._callbacks.handlers,
            inheritable_handlers=self._callbacks.inheritable_handlers,
            parent_run_id=parent_run_id,
            inheritable_tags=tags,
            inheritable_metadata=metadata,
        )
