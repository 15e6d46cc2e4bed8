"""Generators that only their owner closes.

An event loop that ends (`asyncio.run`) closes all asynchronous generators that it knows of, at once and in any order.
One that closes another, as ours do, then meets one that is being closed already: "aclose(): asynchronous generator is
already running". So the loop gets to know the outermost ones alone, and these close the rest.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar, cast

__all__ = ["Owned"]

T = TypeVar("T")


class Owned(AsyncIterator[T], Generic[T]):
    """What `parts`, a generator that has not begun, yields; the event loop does not know of it."""

    def __init__(self, parts: AsyncIterator[T]) -> None:
        self._parts = cast("AsyncGenerator[T]", parts)  # LangChain types its generators as iterators

    def __anext__(self) -> Awaitable[T]:
        with _unknown():
            return self._parts.__anext__()

    def aclose(self) -> Awaitable[None]:
        """Closes `parts`."""
        with _unknown():
            return self._parts.aclose()


@contextmanager
def _unknown() -> Iterator[None]:
    """What is asked for its first value meanwhile stays unknown to the event loop of this thread."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        yield
    finally:
        sys.set_asyncgen_hooks(*hooks)
