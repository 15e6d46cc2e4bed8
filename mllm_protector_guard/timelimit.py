"""A time limit over several calls, for code that cannot be interrupted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mllm_protector_guard.errors import CheckTimeoutError
from mllm_protector_guard.patience import Patience

__all__ = ["TimeLimit"]

T = TypeVar("T")


class TimeLimit:
    """Holds calls to what is left of a time budget; the time between calls is not counted.

    Args:
        seconds: The budget of all calls together. None sets no limit and runs calls in the caller's thread.
    """

    def __init__(self, seconds: float | None) -> None:
        self._left_s = seconds

    def run(self, call: Callable[[], T]) -> T:
        """The value of `call()`.

        Python cannot stop a thread: a call that overruns is left to end by itself and its value is dropped. The
        `Patience` it runs under is over then, so that it stays in no queue.

        Raises:
            CheckTimeoutError: The budget ran out; with nothing left, `call` is not even started.
        """
        if self._left_s is None:
            return call()
        if self._left_s <= 0.0:
            raise CheckTimeoutError(_RAN_OUT)
        done: Future[T] = Future()
        patience = Patience()
        bound = patience.bind(call)
        threading.Thread(target=_settle, args=(done, bound), name="mllm-protector-check", daemon=True).start()
        started = time.perf_counter()
        try:
            return done.result(timeout=self._left_s)
        except TimeoutError as error:
            if done.done() and done.exception() is error:  # the call's own error, not ours
                raise
            patience.end()
            raise CheckTimeoutError(_RAN_OUT) from error
        finally:
            self._left_s -= time.perf_counter() - started


_RAN_OUT = "the check ran out of GuardPolicy.timeout_s; raise it or use a faster model"


def _settle(done: Future[T], call: Callable[[], T]) -> None:
    try:
        done.set_result(call())
    except BaseException as error:
        done.set_exception(error)
