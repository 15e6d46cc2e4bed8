"""What the guard needs from the outside: a detector, a detoxifier, and places for records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mllm_protector_guard.types import ImageInput, Turn

if TYPE_CHECKING:
    from mllm_protector_guard.tracing.record import GuardRecord

__all__ = ["Detoxifier", "HarmDetector", "RecordSink", "StreamScorer", "StreamingDetector"]


@runtime_checkable
class HarmDetector(Protocol):
    """Scores answers.

    A detector may also have `threshold: float`, the calibrated score from which it calls an answer
    harmful (else 0.5), and `warm_up() -> None`, which loads what scoring needs. The guard calls it before
    every check, so it must cost nothing once all is loaded. `score` and `warm_up` are called from several
    threads at once: those of the callers, and of `executor`, a `concurrent.futures.Executor` that it may have for the
    checks of async callers. Without one these share the few threads that asyncio has.
    """

    def score(self, turns: Sequence[Turn]) -> list[float]:
        """P(harmful) of each answer given its question, same order, each finite and in [0, 1].

        The whole answer is judged, however long; a detector that cannot must raise.
        An empty sequence gives an empty list.
        """
        ...


@runtime_checkable
class StreamScorer(Protocol):
    """Scores one growing answer. One thread uses it at a time."""

    def feed(self, text: str) -> float:
        """P(harmful) of the whole answer so far, question given, after `text` was added; finite and in [0, 1]."""
        ...

    def close(self) -> None:
        """Frees what it holds; `feed` raises afterwards. Closing twice is fine."""
        ...


@runtime_checkable
class StreamingDetector(HarmDetector, Protocol):
    """A detector that scores an answer while it grows, at the price of what is new.

    However an answer is cut, the last `feed` agrees with `score` of the whole answer within 1e-3 in float32.
    """

    def open_stream(self, question: str | None, images: Sequence[ImageInput] = ()) -> StreamScorer:
        """A scorer at the start of an answer to `question`."""
        ...


@runtime_checkable
class Detoxifier(Protocol):
    """Rewrites harmful answers. May also have `warm_up() -> None`."""

    def rewrite(self, turns: Sequence[Turn], *, attempt: int = 0) -> list[str]:
        """One harmless answer per turn, same order; "" says that none could be written.

        Args:
            turns: Questions with the harmful answers to them.
            attempt: 0 asks for the best rewrite; above 0 the text must be sampled anew.
        """
        ...


@runtime_checkable
class RecordSink(Protocol):
    """Takes the record of every check. Its errors are logged and never reach the answer."""

    def emit(self, record: GuardRecord) -> None:
        """Keeps one record."""
        ...
