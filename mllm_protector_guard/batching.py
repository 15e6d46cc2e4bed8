"""Micro-batching: `score` calls of several threads and tasks share the forward passes of one detector."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice

from mllm_protector_guard import calls
from mllm_protector_guard.calls import has_method, name_of
from mllm_protector_guard.errors import ConfigError, DetectorBusyError, DetectorError
from mllm_protector_guard.patience import Patience
from mllm_protector_guard.ports import HarmDetector, StreamingDetector, StreamScorer
from mllm_protector_guard.rescoring import RescoringStream
from mllm_protector_guard.types import ImageInput, Turn

__all__ = ["BatchingDetector"]

logger = logging.getLogger(__name__)

# Below this length, questions included, texts cost about the same, for a pass has a price of its own.
_SHORT_CHARS = 256


class BatchingDetector:
    """A detector whose concurrent calls share forward passes. Guards may share it, too.

    A call that finds the detector free runs at once, in its own thread. Those that come while it works wait, and
    then the one that has waited longest leads the next batch: itself, and others of like length in the order in
    which they came. So every batch serves the oldest call, and no call is overtaken for ever. A call of more than
    `max_batch` turns is scored in parts, and others come between them.

    A batch that fails is dissolved, and each of its calls runs alone: an error reaches only the call that caused it.
    A call whose caller gave up, by a time limit or as a cancelled task, leaves the queue unscored.

    The calling threads do the work (leader and followers), so none has to be watched, and an error is raised where it
    belongs. The threads of `executor` only carry async checks, for which those of asyncio are too few to fill a
    batch; they end with `close`, or when the detector is let go.

    Args:
        detector: Scores the batches, one at a time.
        max_batch: Most turns in a batch; twice as many checks of async callers can be under way.
        max_wait_ms: How long a call that has waited for a batch waits for more company if its own is not full,
            milliseconds. A call that finds the detector free never waits.
        max_waiting: Most calls that may wait; further ones get `DetectorBusyError` at once.
        length_ratio: The longest of a batch has at most so many times the characters of the shortest.

    Attributes:
        detector: What scores the batches.
        executor: Threads for the checks of async callers.

    Raises:
        ConfigError: A setting cannot work.

    Example:
        >>> from mllm_protector_guard import BatchingDetector, Guard, GuardPolicy, Turn
        >>> from mllm_protector_guard.fakes import KeywordDetector
        >>> with BatchingDetector(KeywordDetector({"bomb"}), max_batch=64) as detector:
        ...     guard = Guard(detector=detector, policy=GuardPolicy(on_harm="withhold"))
        ...     guard.check(Turn(question="How?", answer="Plant roses.")).outcome.value
        'passed'
    """

    def __init__(
        self,
        detector: HarmDetector,
        *,
        max_batch: int = 32,
        max_wait_ms: float = 2.0,
        max_waiting: int = 1024,
        length_ratio: float = 4.0,
    ) -> None:
        if not has_method(detector, "score"):
            raise ConfigError(f"batching needs a detector with a score() method, got {name_of(detector)}")
        if not (max_batch >= 1 and max_waiting >= 1 and length_ratio >= 1.0):
            raise ConfigError("max_batch, max_waiting and length_ratio must be 1 or more")
        if not 0.0 <= max_wait_ms <= 60_000.0:
            raise ConfigError(f"max_wait_ms must be milliseconds from 0 to 60,000, got {max_wait_ms}")
        self.detector = detector
        self.max_batch = max_batch
        self.max_wait_ms = max_wait_ms
        self.max_waiting = max_waiting
        self.length_ratio = length_ratio
        self.executor = ThreadPoolExecutor(2 * max_batch, thread_name_prefix="mllm-protector-check")
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[_Call] = deque()
        # While it is set, one call holds the detector, from before its batch is put together until it has an heir.
        self._busy = False
        self._closed = False

    @property
    def threshold(self) -> float | None:
        """The detector's own, if it has one."""
        own: float | None = getattr(self.detector, "threshold", None)
        return own

    def warm_up(self) -> None:
        """Loads the detector, if it has to be loaded."""
        calls.warm_up(self.detector)

    def score(self, turns: Sequence[Turn]) -> list[float]:
        """P(harmful) of each answer as the detector gives it, same order.

        Raises:
            DetectorBusyError: `max_waiting` calls wait already.
            DetectorError: Nobody waits for the scores any more, or the detector gave a wrong number of them.
            ConfigError: This detector is closed.
        """
        if not turns:
            return []
        if len(turns) <= self.max_batch:
            return self._score(tuple(turns))
        scores: dict[int, float] = {}
        order = sorted(range(len(turns)), key=lambda index: _chars(turns[index]))
        for start in range(0, len(order), self.max_batch):
            part = order[start : start + self.max_batch]
            values = self._score(tuple(turns[index] for index in part))
            self._require(values, len(part))
            scores.update(zip(part, values, strict=True))
        return [scores[index] for index in range(len(turns))]

    def open_stream(self, question: str | None, images: Sequence[ImageInput] = ()) -> StreamScorer:
        """The detector's own scorer of a growing answer; where it has none, every feed is a `score` that is batched."""
        if isinstance(self.detector, StreamingDetector):
            own = self.detector.open_stream(question, images)
            if not isinstance(own, RescoringStream):
                return own
            own.close()
        return RescoringStream(self, question, images)

    def close(self) -> None:
        """Refuses new calls, waits for those that were taken on, and ends the threads. Closing twice is fine."""
        self.executor.shutdown(wait=True)
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._busy)

    def __enter__(self) -> BatchingDetector:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _score(self, turns: tuple[Turn, ...]) -> list[float]:
        call = self._enter(turns)
        if call is None:
            try:
                return list(self.detector.score(turns))
            finally:
                self._hand_over()
        try:
            call.called.wait()
            if call.state is _State.ABANDONED:
                raise DetectorError("the caller gave up before the answer could be scored")
            return self._lead(call) if call.state is _State.LEADS else call.scores
        finally:
            if call.state is not _State.SCORED:
                self._leave(call)

    def _enter(self, turns: tuple[Turn, ...]) -> _Call | None:
        """A place in the queue; None if the detector is free, and then this call holds it."""
        with self._changed:
            if self._closed:
                raise ConfigError("this BatchingDetector is closed; make a new one")
            if not self._busy:
                self._busy = True
                return None
            if len(self._waiting) >= self.max_waiting:
                self._dismiss_abandoned()
            if len(self._waiting) >= self.max_waiting:
                raise DetectorBusyError(
                    f"{len(self._waiting)} calls wait for {name_of(self.detector)} already. Send fewer at a time, "
                    "set GuardPolicy.timeout_s, or raise max_waiting."
                )
            call = _Call(turns=turns, chars=max(map(_chars, turns)), patience=Patience.current())
            self._waiting.append(call)
            self._changed.notify_all()
            return call

    def _lead(self, own: _Call) -> list[float]:
        batch = [own]
        try:
            if not own.alone:
                batch += self._company(own)
            turns = tuple(turn for call in batch for turn in call.turns)
            scores = list(self.detector.score(turns))
            if len(batch) == 1:
                return scores
            self._require(scores, len(turns))
        except BaseException as error:
            self._dissolve(batch[1:])
            if len(batch) == 1 or not isinstance(error, Exception):
                raise
            logger.warning("a batch of %d calls failed with %s; each runs alone now", len(batch), name_of(error))
        else:
            values = iter(scores)
            for call in batch:
                call.scores = list(islice(values, len(call.turns)))
            for call in batch[1:]:
                call.turn_to(_State.SCORED)
            return own.scores
        return list(self.detector.score(own.turns))

    def _company(self, own: _Call) -> list[_Call]:
        """The calls that share a batch with `own`, taken from the queue."""

        def full() -> bool:
            return len(own.turns) + sum(len(call.turns) for call in self._waiting) >= self.max_batch

        with self._changed:
            self._changed.wait_for(full, timeout=self.max_wait_ms / 1000.0)
            self._dismiss_abandoned()
            company: list[_Call] = []
            room, shortest, longest = self.max_batch - len(own.turns), own.chars, own.chars
            for call in self._waiting:
                low, high = min(shortest, call.chars), max(longest, call.chars)
                if not call.alone and len(call.turns) <= room and high <= low * self.length_ratio:
                    company.append(call)
                    room, shortest, longest = room - len(call.turns), low, high
            for call in company:
                self._waiting.remove(call)
            return company

    def _dissolve(self, others: list[_Call]) -> None:
        """Puts calls whose batch failed back to the head of the queue, each to run alone, by its own thread."""
        with self._changed:
            for call in reversed(others):
                if call.state is _State.WAITS:
                    call.alone = True
                    self._waiting.appendleft(call)

    def _leave(self, call: _Call) -> None:
        """Ends a call that has no scores, or led; a thread may be interrupted anywhere, and no other may hang then."""
        with self._changed:
            led = call.state is _State.LEADS
            call.state = _State.ABANDONED
            if call in self._waiting:
                self._waiting.remove(call)
        if led:
            self._hand_over()

    def _hand_over(self) -> None:
        """Lets the oldest call lead, or leaves the detector free."""
        with self._changed:
            self._dismiss_abandoned()
            if self._waiting:
                self._waiting.popleft().turn_to(_State.LEADS)
            else:
                self._busy = False
                self._changed.notify_all()

    def _dismiss_abandoned(self) -> None:
        abandoned = [call for call in self._waiting if call.patience.over]
        for call in abandoned:
            self._waiting.remove(call)
            call.turn_to(_State.ABANDONED)

    def _require(self, scores: list[float], count: int) -> None:
        if len(scores) != count:
            raise DetectorError(f"{name_of(self.detector)} gave {len(scores)} scores for {count} turns")


class _State(Enum):
    WAITS = auto()
    LEADS = auto()
    SCORED = auto()
    ABANDONED = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class _Call:
    """One `score` that could not run at once.

    Attributes:
        chars: Length of the longest turn, characters.
        patience: Whether anybody waits for the scores.
        alone: Whether it may share no batch, because one with it has failed.
        called: Set when it waits no more, and `state` says why.
    """

    turns: tuple[Turn, ...]
    chars: int
    patience: Patience
    alone: bool = False
    state: _State = _State.WAITS
    called: threading.Event = field(default_factory=threading.Event)
    scores: list[float] = field(default_factory=list)

    def turn_to(self, state: _State) -> None:
        """Wakes the thread that waits."""
        self.state = state
        self.called.set()


def _chars(turn: Turn) -> int:
    return max(_SHORT_CHARS, len(turn.question or "") + len(turn.answer))
