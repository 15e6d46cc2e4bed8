"""Calls in other threads whose callers may give up: Python cannot stop them, but what still queues can leave."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from mllm_protector_guard.errors import ConfigError

__all__ = ["Patience", "in_thread"]

T = TypeVar("T")


class Patience:
    """Whether somebody still waits for the value of a call; the caller ends it on giving up."""

    def __init__(self) -> None:
        self._outer = _current.get()
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether nobody waits any more: this caller gave up, or one further out for whom it waits."""
        return self._ended or (self._outer is not None and self._outer.over)

    def end(self) -> None:
        """Says that the caller gave up."""
        self._ended = True

    def bind(self, call: Callable[[], T]) -> Callable[[], T]:
        """`call` for another thread: it runs with the context variables of here, and `current` finds this patience."""
        context = contextvars.copy_context()
        context.run(_current.set, self)
        return lambda: context.run(call)

    @staticmethod
    def current() -> Patience:
        """That of the caller for whom this code runs; it never ends if there is none who could give up."""
        return _current.get() or Patience()


_current: contextvars.ContextVar[Patience | None] = contextvars.ContextVar("mllm_protector_patience", default=None)


async def in_thread(executor: Executor | None, call: Callable[[], T]) -> T:
    """The value of `call()`, run by a thread of `executor`; None takes the threads of asyncio.

    Raises:
        ConfigError: The threads have ended.
    """
    patience = Patience()
    try:
        future = asyncio.get_running_loop().run_in_executor(executor, patience.bind(call))
    except RuntimeError as error:
        if executor is None:
            raise
        raise ConfigError("the detector was closed and its threads have ended; make a new guard") from error
    try:
        return await future
    except asyncio.CancelledError:
        patience.end()
        raise
