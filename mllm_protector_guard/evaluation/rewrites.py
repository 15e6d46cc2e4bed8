"""What can be said of rewrites by their texts alone, and the shares and means that sum it up."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

from mllm_protector_guard.evaluation.metrics import Interval, wilson

__all__ = [
    "Distinctness",
    "Distribution",
    "Share",
    "distinctness",
    "ends_properly",
    "first_sentence",
    "longest_common_run",
    "main_script",
    "words",
]

# An ideographic mark ends a sentence by itself, a Latin one only before a space: "3.5" and "e.g.," hold none.
_SENTENCE = re.compile(r".+?(?:[.!?؟।]+[\"'”’»)\]*_]*(?=\s|$)|[。！？]+[”’」』）]*|(?=\n)|$)", re.DOTALL)
_ENDED = re.compile(r"(?:(?<!\.)\.|[!?؟।。！？])[\"'”’»」』)）\]*_`]*$")
_LIST_ITEM = re.compile(r"\s*(?:[-*•–]|\d+[.)])\s+\S")
_MARKER = re.compile(r"\s*(?:[-*•–]|\d+[.)])\s*$")
_UNFINISHED = re.compile(r"[,;:(–—-]$|\.\.$|…$")
_FENCE = "```"


def longest_common_run(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the longest stretch of neighbouring elements that both have."""
    return SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size


def words(text: str) -> list[str]:
    """The words in order, without case and punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.casefold())


def ends_properly(text: str) -> bool:
    """Whether the text ends where its writer meant it to.

    It does with a mark that ends a sentence, which quotes and brackets may follow; with a closed block of code;
    or with a list item that has content and no comma or colon at its end. An ellipsis trails off, and is no end.
    """
    stripped = text.rstrip()
    if not stripped or stripped.count(_FENCE) % 2:
        return False
    line = stripped.splitlines()[-1]
    if stripped.endswith(_FENCE):
        return True
    if _MARKER.match(line) or _UNFINISHED.search(line):
        return False
    return bool(_ENDED.search(line) or _LIST_ITEM.match(line))


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence or line, without case and with single spaces.

    "Dr. Who" ends after the "Dr.", for no dictionary is asked.
    """
    found = _SENTENCE.match(text.strip())
    return " ".join(found[0].split()).casefold() if found else ""


class Distinctness(NamedTuple):
    """How often rewrites begin alike.

    Attributes:
        repeated: Texts whose first sentence is also another's.
        commonest: Texts that begin with the commonest first sentence.
        texts: All texts.
    """

    repeated: int
    commonest: int
    texts: int


def distinctness(texts: Sequence[str]) -> Distinctness:
    """How many of the texts share their first sentence with another."""
    counts = Counter(first_sentence(text) for text in texts)
    repeated = sum(count for count in counts.values() if count > 1)
    return Distinctness(repeated=repeated, commonest=max(counts.values(), default=0), texts=len(texts))


def main_script(text: str) -> str | None:
    """The script of most letters, by the first word of their Unicode names ("LATIN", "CJK"); None without letters."""
    scripts = Counter(unicodedata.name(char, "").partition(" ")[0] for char in text if char.isalpha())
    return scripts.most_common(1)[0][0] if scripts else None


class Share(NamedTuple):
    """A part of a whole.

    Attributes:
        part: Cases that have the property.
        whole: All cases; none leave share and interval undefined.
    """

    part: int
    whole: int

    @property
    def share(self) -> float | None:
        """In [0, 1]; None of nothing."""
        return self.part / self.whole if self.whole else None

    @property
    def interval(self) -> Interval | None:
        """Wilson's 95 % interval (1927); None of nothing."""
        return wilson(self.part, self.whole)


class Distribution(NamedTuple):
    """The middle and the ends of some values.

    Attributes:
        mean: Arithmetic mean.
        low: 5 % quantile.
        high: 95 % quantile.
        values: How many there are.
    """

    mean: float
    low: float
    high: float
    values: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """The distribution of the values; None of nothing."""
        if not len(values):
            return None
        low, high = np.quantile(values, (0.05, 0.95))
        return cls(mean=float(np.mean(values)), low=float(low), high=float(high), values=len(values))
