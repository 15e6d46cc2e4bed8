"""Where a growing text may be cut: at sentence ends and line ends, else by size.

Every decision is made at the character before which a cut would be, and from what stands in front of it. So the
cuts depend on the text alone, however it was chunked, and there is never one at the end of what has come so far.
A missed sentence end only makes a piece longer; the rules rather miss one than break a sentence.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

__all__ = ["Cut", "Cutter", "open_fence"]

# Full stops, question and exclamation marks of alphabets that put a space behind them.
_TERMINATORS = frozenset(".!?…‽؟۔।॥։።፧፨၊။។៕༎།᠃܀܂")
# Marks that end a sentence with no space behind them.
_WIDE_TERMINATORS = frozenset("。！？｡﹖﹗︒")
_CLOSERS = frozenset("\"'”’»›)]}）］｝」』】〉》〕〗*_~`")
_CLOSING_ONLY = frozenset("»›)]}）］｝」』】〉》〕〗")
_OPENERS = "\"'“‘«‹([{*_~`¿¡-–—"
# English, German, French, Spanish, Portuguese, Italian, Dutch and Russian.
_ABBREVIATIONS = frozenset(
    """
    al approx apr art aug av bd bldg ca capt cf ch cia co col corp dec dept dr dra ed eds eq est feb fig figs fr gen
    gov hon hr inc jan jr jul jun lt ltd m maj mar messrs mlle mm mme mr mrs ms mt mx no nos nov nr núm oct op p pág
    par ph pp prof rep rev sec sen sep sept sgt sr sra st ste str tel ud uds univ vol vs abb abs allg bsp bspw bzw
    evtl ggf inkl max min mio mrd sog tab usw vgl zzgl dott sig ing bijv nl гл г др им л п р см стр т тыс ул
    """.split()  # noqa: SIM905 - a list of so many would take a screen
)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)", re.DOTALL)
# What is kept of a word or of the start of a line; longer ones are no abbreviation and no fence.
_KEPT_CHARS = 40

# What stands before the next character: nothing special; a terminator; a terminator and space; a terminator that needs
# no space; a line end.
_End = Literal["", "mark", "space", "wide", "line"]

_JOINERS = frozenset("\u200c\u200d")
_LINE_ENDS = frozenset("\n\r\u2028\u2029\x85")


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where the text may be cut.

    Attributes:
        chars: Characters before it.
        size: The same text in UTF-8, bytes.
    """

    chars: int
    size: int


class Cutter:
    """Finds the cuts of one text that comes in pieces; reads each character once and keeps none of the text.

    Args:
        min_size: A sentence end closer to the last cut is passed over; bytes in UTF-8.
        max_size: From this size on a piece is cut without a sentence end: at the last gap between words in its
            second half, else between two characters as a reader sees them; bytes in UTF-8.
        sentences: Whether sentence ends and line ends are cuts too.
    """

    def __init__(self, *, min_size: int, max_size: int, sentences: bool) -> None:
        self._min_size = min_size
        self._max_size = max_size
        self._sentences = sentences
        self._chars = self._bytes = 0
        self._last: Cut | None = None  # the last cut; None before the first visible character
        self._gap: Cut | None = None
        self._previous = ""
        self._flags = 0
        self._end: _End = ""
        self._word = ""
        self._line = ""
        self._fence = ""

    def add(self, text: str) -> list[Cut]:
        """The cuts that are sure now, in order."""
        cuts: list[Cut] = []
        for char in text:
            space = char.isspace()
            if not space and not self._joined(char):
                cut = self._cut_before(char)
                if cut is not None:
                    cuts.append(cut)
                    self._last = cut
            self._note(char, space)
        return cuts

    def _cut_before(self, char: str) -> Cut | None:
        if self._last is None:
            self._last = Cut(self._chars, self._bytes)  # leading white space belongs to the first sentence
            return None
        if self._previous.isspace():
            self._gap = Cut(self._chars, self._bytes)
        size = self._bytes - self._last.size
        if self._sentences and size >= self._min_size and self._ended(char):
            return Cut(self._chars, self._bytes)
        if size < self._max_size:
            return None
        gap = self._gap
        if gap is not None and 2 * (gap.size - self._last.size) >= size:
            return gap
        return Cut(self._chars, self._bytes)

    def _ended(self, char: str) -> bool:
        """Whether a sentence or line has ended before this character, which is no white space."""
        end = self._end
        if end == "mark":
            # A letter of a script without capitals: no space is to be expected before it.
            return unicodedata.category(char) == "Lo"
        if end == "space":
            return not char.islower() and char not in _CLOSING_ONLY
        if end == "wide":
            return char not in _CLOSERS and char not in _WIDE_TERMINATORS and char not in _TERMINATORS
        return end == "line"

    def _note(self, char: str, space: bool) -> None:
        if self._sentences:
            self._note_end(char, space)
            if char in _LINE_ENDS:
                self._fence = _fence_after(self._line, self._fence)
                self._line = ""
            elif len(self._line) <= _KEPT_CHARS:
                self._line += char
            self._word = "" if space else self._word + char if len(self._word) <= _KEPT_CHARS else self._word
        self._flags = self._flags + 1 if _is_flag(char) else 0
        self._previous = char
        self._chars += 1
        self._bytes += _size(char)

    def _note_end(self, char: str, space: bool) -> None:
        if char in _LINE_ENDS:
            self._end = "line"
        elif space:
            if self._end == "mark":
                self._end = "space"
        elif self._fence:
            self._end = ""
        elif char in _WIDE_TERMINATORS:
            self._end = "wide"
        elif char in _TERMINATORS:
            if self._end != "wide":
                self._end = "" if char == "." and self._abbreviated() else "mark"
        elif self._end in ("space", "line") or (char not in _CLOSERS and not self._joined(char)):
            self._end = ""

    def _abbreviated(self) -> bool:
        """Whether the word before a full stop is an abbreviation, an initial or the number of a list item."""
        word = self._word.lstrip(_OPENERS)
        if word.isdecimal():
            return self._line.strip() == word
        return word.casefold() in _ABBREVIATIONS or _INITIALS.fullmatch(word) is not None

    def _joined(self, char: str) -> bool:
        """Whether the character is one with those before it, as a reader sees them (after UAX #29)."""
        previous = self._previous
        if char < "\u0300" or not previous:
            return False  # "\r\n" is white space, and never the start of a piece
        if _is_flag(char):
            return self._flags % 2 == 1
        return (
            char in _JOINERS
            or previous == "\u200d"
            or unicodedata.category(char) in ("Mn", "Mc", "Me")
            or "\U0001f3fb" <= char <= "\U0001f3ff"
            or "\U000e0020" <= char <= "\U000e007f"
            or "\u1160" <= char <= "\u11ff"
            or ("\udc00" <= char <= "\udfff" and "\ud800" <= previous <= "\udbff")
        )


def open_fence(text: str) -> str:
    """The mark that closes the code block in which `text` ends; "" if it ends in none."""
    fence = ""
    for line in re.split(r"[\n\r\u2028\u2029\x85]", text):
        fence = _fence_after(line, fence)
    return fence


def _fence_after(line: str, fence: str) -> str:
    """The fence that is open after a line, given the one that was open before it (CommonMark 0.31, 4.5)."""
    found = _FENCE.match(line)
    if found is None:
        return fence
    mark, rest = found.groups()
    if not fence:
        return "" if mark[0] == "`" and "`" in rest else mark
    closes = mark[0] == fence[0] and len(mark) >= len(fence) and not rest.strip()
    return "" if closes else fence


def _is_flag(char: str) -> bool:
    return "\U0001f1e6" <= char <= "\U0001f1ff"


def _size(char: str) -> int:
    """Bytes of the character in UTF-8."""
    return 1 if char < "\x80" else 2 if char < "\u0800" else 3 if char < "\U00010000" else 4
