"""Texts that are nearly the same: shingles of words, MinHash signatures, locality-sensitive hashing.

A text is the set of its runs of three neighbouring words, and two texts are as alike as their sets: the Jaccard
index, in [0, 1] (Broder 1997, "On the resemblance and containment of documents"). Signatures only propose pairs;
each is then measured on the whole sets, so that no pair is called near that is not.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["NearTexts", "Parts", "Shingles", "jaccard", "leaders", "shingles"]

Shingles = NDArray[np.uint32]
"""The hashed word runs of a text: sorted, each once."""

Parts = tuple[Shingles, ...]
"""The shingles of texts that belong together, as of a question and its answer."""

_WORDS_A_SHINGLE = 3
_SIGNATURE = 100
"""Hash functions of a signature; the estimate of a Jaccard index is off by 0.05 (one standard deviation) at most."""
_CHUNK = 2048
"""Texts whose signatures are computed at once."""
_RECALL = 0.999
"""Share of the pairs at the threshold that the bands must propose."""

# Scripts without spaces between words; each character counts as one.
_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff])")
_WORD = re.compile(r"\w+")


class _Words:
    """Numbers words by their order of appearance, which is quicker than hashing each anew."""

    def __init__(self) -> None:
        self._numbers: defaultdict[str, int] = defaultdict(lambda: len(self._numbers))

    def numbers(self, text: str) -> NDArray[np.uint64]:
        plain = text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
        spaced = plain if plain.isascii() else _UNSPACED.sub(r" \1 ", plain)
        words = _WORD.findall(spaced) or [plain.strip()]  # a text of signs alone is one word
        return np.fromiter(map(self._numbers.__getitem__, words), np.uint64, len(words))


def shingles() -> Callable[[str], Shingles]:
    """A function that gives the shingles of a text; only shingles of the same function can be compared.

    Case, punctuation, spacing and compatible spellings (NFKC) do not count. A text shorter than a run is one run.
    """
    words = _Words()
    factors = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))

    def of(text: str) -> Shingles:
        numbers = words.numbers(text) + np.uint64(1)
        if len(numbers) < _WORDS_A_SHINGLE:
            numbers = np.pad(numbers, (0, _WORDS_A_SHINGLE - len(numbers)))
        runs = len(numbers) - _WORDS_A_SHINGLE + 1
        mixed = np.zeros(runs, np.uint64)
        for offset, factor in enumerate(factors):
            mixed ^= numbers[offset : offset + runs] * factor
            mixed ^= mixed >> np.uint64(29)
            mixed *= factors[0]
        return np.unique((mixed >> np.uint64(32)).astype(np.uint32))

    return of


def jaccard(one: Shingles, other: Shingles) -> float:
    """Shared shingles over all shingles, in [0, 1]."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def leaders(texts: Sequence[Parts], similarity: float, *, always_lead: int = 0) -> list[int]:
    """For each text the index of the one it is grouped with: itself, or an earlier one that leads its group.

    A text joins the first leader that is near it in every part; else it becomes a leader. So no two leaders are
    near each other, and a group of thousands costs no more than its size.

    Args:
        texts: All have the same number of parts.
        similarity: Jaccard index from which two parts are near, in [0.5, 1].
        always_lead: So many texts from the beginning lead a group of their own even if they are near each other.
    """
    signatures = _signatures(texts)
    buckets = _buckets(signatures, similarity)
    least = (similarity - 0.2) * _SIGNATURE  # four standard deviations below
    led: defaultdict[int, list[int]] = defaultdict(list)
    found: list[int] = []
    for index, parts in enumerate(texts):
        leader = index
        if index >= always_lead:
            proposed = np.array(sorted({other for bucket in buckets[index] for other in led[bucket]}), np.intp)
            alike = (signatures[proposed] == signatures[index]).sum(axis=1) if len(proposed) else proposed
            near = (int(other) for other in proposed[alike >= least] if _is_near(texts[other], parts, similarity))
            leader = next(near, index)
        if leader == index:
            for bucket in buckets[index]:
                led[bucket].append(index)
        found.append(leader)
    return found


def _is_near(one: Parts, other: Parts, similarity: float) -> bool:
    return all(jaccard(mine, its) >= similarity for mine, its in zip(one, other, strict=True))


def _signatures(texts: Sequence[Parts]) -> NDArray[np.uint32]:
    """The MinHash signature of each text over all its parts, uint32 [texts, _SIGNATURE].

    Parts are told apart by a mark on their shingles. If all parts of two texts are near, the union is too, so one
    signature a text is enough.
    """
    rng = np.random.default_rng(0)
    # Multiply-add-shift hashing (Dietzfelbinger 1996).
    factors, offsets = rng.integers(0, 2**63, (2, _SIGNATURE), np.uint64) * np.uint64(2) + np.uint64(1)
    signatures = np.empty((len(texts), _SIGNATURE), np.uint32)
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        marked = [part ^ np.uint32(0x5BD1E995 * place % 2**32) for parts in chunk for place, part in enumerate(parts)]
        lengths = [sum(map(len, parts)) for parts in chunk]
        starts = np.concatenate(([0], np.cumsum(lengths[:-1]))).astype(np.intp)
        values = np.concatenate(marked).astype(np.uint64)
        for place, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
            hashed = ((values * factor + offset) >> np.uint64(32)).astype(np.uint32)
            signatures[start : start + len(chunk), place] = np.minimum.reduceat(hashed, starts)
    return signatures


def _buckets(signatures: NDArray[np.uint32], similarity: float) -> list[list[int]]:
    """For each text the numbers of the buckets that it shares with others.

    Texts share a bucket when a band of their signatures is equal. The bands are as wide as the recall allows:
    a pair of Jaccard index s shares one of b bands of r rows with probability 1 - (1 - s^r)^b.
    """
    rows = max(r for r in range(1, 21) if r == 1 or 1 - (1 - similarity**r) ** (_SIGNATURE // r) >= _RECALL)
    shared: list[list[int]] = [[] for _ in range(len(signatures))]
    count = 0
    for start in range(0, _SIGNATURE // rows * rows, rows):
        band = np.ascontiguousarray(signatures[:, start : start + rows]).view(np.dtype((np.void, 4 * rows))).ravel()
        _, bucket, size = np.unique(band, return_inverse=True, return_counts=True)
        for index in np.flatnonzero(size[bucket] > 1):
            shared[index].append(count + int(bucket[index]))
        count += len(size)
    return shared


class NearTexts:
    """Texts that were seen, to tell whether a new one is near one of them.

    Args:
        similarity: Jaccard index from which two texts are near, in (0, 1].
    """

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._shingles = shingles()
        self._lengths: list[int] = []
        self._holders: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Keeps the text and returns True, or returns False if one like it is there."""
        new = self._shingles(text).tolist()
        shared: defaultdict[int, int] = defaultdict(int)
        for shingle in new:
            for holder in self._holders.get(shingle, ()):
                shared[holder] += 1
        for holder, count in shared.items():
            if count >= self._similarity * (len(new) + self._lengths[holder] - count):
                return False
        for shingle in new:
            self._holders[shingle].append(len(self._lengths))
        self._lengths.append(len(new))
        return True
