"""Runs a model unseen: what it starts inside itself has no callbacks and no tracers.

A model that is called by its inner methods sends no events of its own. But it may call other runnables, and those
look into context variables for the callbacks of the run around them, for LangSmith, and for handlers such as those of
`collect_runs` or of the question capture.

Not silenced, for they are no context variables: `set_debug(True)`, and handlers that an environment variable other
than LangSmith's switches on. Both see the models that a model calls inside itself, not the model.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextvars import ContextVar, Token, copy_context
from typing import Any, Final, TypeVar

from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tracers.context import _configure_hooks, tracing_v2_callback_var
from langsmith import tracing_context

__all__ = ["Silence", "silent_astream", "silent_stream"]

T = TypeVar("T")
_END: Final[Any] = object()


class Silence:
    """A `with` block without callbacks and tracers; for one caller, any number of times."""

    def __init__(self) -> None:
        # Found out once, because LangSmith takes longer over it than a chunk may take.
        self._silent = copy_context().run(_silent_values)
        self._tokens: list[tuple[ContextVar[Any], Token[Any]]] = []

    def __enter__(self) -> None:
        self._tokens = [(variable, variable.set(value)) for variable, value in self._silent]

    def __exit__(self, *error: object) -> None:
        for variable, token in self._tokens:
            variable.reset(token)


def silent_stream(start: Callable[[], Iterator[T]]) -> Generator[T]:
    """What `start()` yields, made in silence; closed with its source."""
    silence = Silence()
    with silence:
        parts = start()
    try:
        while True:
            with silence:
                part = next(parts, _END)
            if part is _END:
                return
            yield part
    finally:
        if isinstance(parts, Generator):
            with silence:
                parts.close()


async def silent_astream(start: Callable[[], AsyncIterator[T]]) -> AsyncGenerator[T]:
    """What `start()` yields, made in silence; closed with its source."""
    silence = Silence()
    with silence:
        parts = start()
    try:
        while True:
            with silence:
                part = await anext(parts, _END)
            if part is _END:
                return
            yield part
    finally:
        if isinstance(parts, AsyncGenerator):
            with silence:
                await parts.aclose()


def _silent_values() -> list[tuple[ContextVar[Any], Any]]:
    """The context variables that differ in silence, with their values there."""
    loud = copy_context()
    with tracing_context(enabled=False, parent=False):
        variables: list[ContextVar[Any]] = [var_child_runnable_config, tracing_v2_callback_var]
        for variable in variables + [hook[0] for hook in _configure_hooks]:
            variable.set(None)
        return [
            (variable, value) for variable, value in copy_context().items() if loud.get(variable, _END) is not value
        ]
