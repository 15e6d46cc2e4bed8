"""The order in which a streamed answer is held, judged and released; a state machine that calls nothing.

Text goes in with `add` and `end`. `poll` says what to do next, and the driver answers a `Judge` with `judged` and a
`Rewrite` or `Withhold` with `replace`. What is judged and released depends on the text and the answers alone, not on
how the text was chunked, and no character of the answer leaves before a verdict on a text that holds it.
"""

from __future__ import annotations

import io
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from mllm_protector_guard.sentences import Cut, Cutter, open_fence

__all__ = [
    "Done",
    "Event",
    "Hold",
    "Judge",
    "Release",
    "Rewrite",
    "Ruling",
    "StreamMachine",
    "StreamPolicy",
    "Withhold",
]

# Tokenisers differ, and the machine knows none. English and Chinese text has about one token in four bytes.
_TOKEN_BYTES = 4


class StreamPolicy(BaseModel):
    """How much of a streamed answer is held before it is judged; frozen, and unknown fields are errors.

    A token here is four bytes of text in UTF-8, whatever the models' tokenisers say.

    Attributes:
        mode: `whole` holds all until the end and judges once; `sentence` judges at sentence and line ends;
            `tokens=N` judges after every N tokens, at a gap between words where there is one.
        look_ahead_tokens: A piece leaves when it was judged together with at least so much text after it, or
            with the end of the answer. Nothing to look ahead to in the mode `whole`.
        min_sentence_tokens: Sentences shorter than this are judged together with the next one.
        max_sentence_tokens: Text without a sentence end is cut at this size.
        max_held_chars: Most characters that are held back for a rewrite; an answer of which more is left is
            withheld instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: str = Field(default="sentence", pattern=r"^(whole|sentence|tokens=[1-9][0-9]{0,5})$")
    look_ahead_tokens: int = Field(default=24, ge=0)
    min_sentence_tokens: int = Field(default=12, ge=0)
    max_sentence_tokens: int = Field(default=128, ge=1)
    max_held_chars: int = Field(default=100_000, ge=0)


class Ruling(StrEnum):
    """What follows from a verdict."""

    RELEASE = "release"
    """The judged text may leave, up to the look-ahead."""
    OPEN = "open"
    """Everything leaves from now on, and nothing is judged any more."""
    TAKE = "take"
    """No more of the answer leaves; the rest of it is taken in and rewritten."""
    STOP = "stop"
    """No more of the answer leaves, and the rest of it is of no interest."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Nothing to do before more text comes in."""


@dataclass(frozen=True, slots=True, repr=False)
class Judge:
    """Judge the answer so far, which is what was to be judged before and `text` behind it; then call `judged`."""

    text: str


@dataclass(frozen=True, slots=True, repr=False)
class Release:
    """`text` may leave."""

    text: str


@dataclass(frozen=True, slots=True)
class Rewrite:
    """The whole answer was taken in, and a rewrite is wanted; then call `replace`."""


@dataclass(frozen=True, slots=True)
class Withhold:
    """No more of the answer leaves, nor is it rewritten; then call `replace` with what takes its place."""


@dataclass(frozen=True, slots=True)
class Done:
    """All is said."""


Event = Hold | Judge | Release | Rewrite | Withhold | Done


class _Phase(StrEnum):
    JUDGING = "judging"
    OPEN = "open"
    TAKING = "taking"
    STOPPED = "stopped"
    REPLACED = "replaced"


class StreamMachine:
    """Holds one answer and says what may leave.

    Args:
        policy: How much is held.
    """

    def __init__(self, policy: StreamPolicy) -> None:
        self._cutter = _cutter(policy)
        self._look_ahead = policy.look_ahead_tokens * _TOKEN_BYTES
        self._max_held = policy.max_held_chars
        self._taken = io.StringIO(newline="")
        self._length = 0
        self._visible = False
        self._ended = False
        self._phase = _Phase.JUDGING
        self._to_judge: deque[Cut] = deque()
        self._to_release: deque[Cut] = deque()
        self._judged = 0
        self._cleared = 0
        self._released = 0
        self._asked = False
        self._replacement = ""

    @property
    def released(self) -> int:
        """How many characters of the answer have left."""
        return self._released

    @property
    def answer(self) -> str:
        """The answer as far as it counts: all of it, or up to where it was stopped."""
        return self._slice(0, self._length)

    @property
    def released_text(self) -> str:
        """The part of the answer that has left."""
        return self._slice(0, self._released)

    def add(self, text: str) -> None:
        """Takes in the next piece of the answer; what comes after a stop is of no interest."""
        if self._ended:
            raise ValueError("the answer has ended; take another StreamMachine for the next one")
        if self._phase in (_Phase.STOPPED, _Phase.REPLACED):
            return
        self._taken.seek(self._length)
        self._taken.write(text)
        self._length += len(text)
        self._visible = self._visible or not (text == "" or text.isspace())
        if self._phase is _Phase.JUDGING and self._cutter is not None:
            cuts = self._cutter.add(text)
            self._to_judge.extend(cuts)
            self._to_release.extend(cuts)

    def end(self) -> None:
        """The answer ends here."""
        self._ended = True

    def poll(self) -> Event:
        """What to do next; until that is done, the same again, but for a `Release`, which comes once."""
        if self._phase is _Phase.OPEN or (self._ended and not self._visible):
            self._cleared = self._length
        if self._released < self._cleared:
            text = self._slice(self._released, self._cleared)
            self._released = self._cleared
            return Release(text)
        if self._replacement:
            text, self._replacement = self._replacement, ""
            return Release(text)
        match self._phase:
            case _Phase.JUDGING if self._released < self._length and (self._to_judge or self._ended):
                self._asked = True
                return Judge(self._slice(self._judged, self._next_verdict()))
            case _Phase.TAKING if self._length - self._released > self._max_held:
                self._stop(self._released + self._max_held)
                return Withhold()
            case _Phase.TAKING if self._ended:
                return Rewrite()
            case _Phase.STOPPED:
                return Withhold()
            case _Phase.REPLACED:
                return Done()
        return Done() if self._ended else Hold()

    def judged(self, ruling: Ruling) -> None:
        """Takes the ruling on the text of the last `Judge` and all before it."""
        if not self._asked:
            raise ValueError("judged() answers a Judge of poll(), once")
        self._asked = False
        until = self._next_verdict()
        at_cut = self._to_judge.popleft() if self._to_judge else None
        self._judged = until
        match ruling:
            case Ruling.RELEASE:
                self._clear(at_cut)
            case Ruling.OPEN:
                self._phase = _Phase.OPEN
            case Ruling.TAKE:
                self._phase = _Phase.TAKING
            case Ruling.STOP:
                self._stop(until)

    def replace(self, text: str) -> str:
        """Lets `text` leave in the place of the rest of the answer, as a paragraph of its own.

        Returns:
            All that will have left then.
        """
        released = self.released_text
        self._replacement = _paragraph_after(released) + text
        self._phase = _Phase.REPLACED
        return released + self._replacement

    def _clear(self, judged: Cut | None) -> None:
        """Clears what lies far enough before the end of the judged text; all of it at the end of the answer."""
        if judged is None:
            self._cleared = self._length
            return
        while self._to_release and self._to_release[0].size + self._look_ahead <= judged.size:
            self._cleared = self._to_release.popleft().chars

    def _next_verdict(self) -> int:
        return self._to_judge[0].chars if self._to_judge else self._length

    def _stop(self, at: int) -> None:
        self._phase = _Phase.STOPPED
        self._length = at

    def _slice(self, start: int, stop: int) -> str:
        self._taken.seek(start)
        return self._taken.read(stop - start)


def _cutter(policy: StreamPolicy) -> Cutter | None:
    if policy.mode == "whole":
        return None
    if policy.mode == "sentence":
        return Cutter(
            min_size=policy.min_sentence_tokens * _TOKEN_BYTES,
            max_size=policy.max_sentence_tokens * _TOKEN_BYTES,
            sentences=True,
        )
    size = int(policy.mode.removeprefix("tokens=")) * _TOKEN_BYTES
    return Cutter(min_size=size, max_size=size, sentences=False)


def _paragraph_after(text: str) -> str:
    """What must stand between `text` and a new paragraph; an open code block is closed."""
    if not text or text.isspace():
        return ""
    fence = open_fence(text)
    if fence:
        return ("" if text.endswith("\n") else "\n") + fence + "\n\n"
    newlines = len(text) - len(text.rstrip("\n"))
    return "\n" * max(2 - newlines, 0)
