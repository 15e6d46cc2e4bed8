"""Long answers in which one paragraph is harmful, and the same answers without it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.evaluation.data import LabelledRow

__all__ = ["BuriedRow", "bury", "count_words", "paragraphs_of"]

# Scripts without spaces between words: each of their characters counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0eff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuriedRow:
    """A long answer twice.

    Attributes:
        row: The harmful row as it was.
        buried: Its answer as one paragraph among harmless ones.
        without: Harmless paragraphs only, of about the same length, to the same question.
    """

    row: LabelledRow
    buried: LabelledRow
    without: LabelledRow


def count_words(text: str) -> int:
    """Words between spaces; of scripts that have no spaces, as Chinese, the characters."""
    return len(_WORD.findall(text))


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs of a text, which are parted by blank lines."""
    return [part.strip() for part in _BLANK_LINES.split(text) if part.strip()]


def bury(
    rows: Sequence[LabelledRow], *, words: int = 1500, filler: Sequence[str] | None = None, seed: int = 0
) -> list[BuriedRow]:
    """Each harmful answer of the rows, buried in harmless text at a random place.

    The harmless text is made of whole paragraphs, drawn without repetition until all were used once: answers of the
    harmless rows, of the same language where there are any, or the paragraphs of `filler`. A question that is left
    with harmless text makes no harmless answer harmful, so the long answer without the paragraph is harmless.

    Args:
        rows: Harmful rows to bury and, without `filler`, harmless ones to bury them in.
        words: About how long a long answer is, see `count_words`; 1,500 English words are about 2,000 tokens. It ends
            with the paragraph that reaches it.
        filler: Harmless paragraphs.
        seed: Makes text and place repeatable.

    Raises:
        ConfigError: `words` is below 1, or there is no harmless text.
    """
    if words < 1:
        raise ConfigError(f"words is {words!r}; give a number of at least 1")
    pools: dict[str | None, list[str]] = {None: []}
    if filler is not None:
        pools[None] = [part for part in filler if part.strip()]
    else:
        for row in rows:
            if row.harmful is False and row.answer.strip():
                for lang in {row.lang, None}:
                    pools.setdefault(lang, []).append(row.answer)
    harmful = [row for row in rows if row.harmful is True and row.answer.strip()]
    if harmful and not pools[None]:
        raise ConfigError("there is no harmless text to bury answers in; add harmless rows or give a filler text")
    rng = random.Random(seed)  # noqa: S311 - a repeatable draw, no secret
    decks = {lang: _endless(pool, rng) for lang, pool in pools.items()}
    return [_bury_one(row, decks.get(row.lang) or decks[None], words, rng) for row in harmful]


def _endless(pool: Sequence[str], rng: random.Random) -> Iterator[str]:
    """The paragraphs in a random order, and again in another one when they are used up."""
    while True:
        yield from rng.sample(pool, len(pool))


def _bury_one(row: LabelledRow, deck: Iterator[str], words: int, rng: random.Random) -> BuriedRow:
    without: list[str] = []
    missing, own = words, count_words(row.answer)
    around = None
    while missing > 0:
        if around is None and missing <= own:
            around = len(without)  # the paragraphs up to here and the harmful one are long enough together
        without.append(next(deck))
        missing -= max(count_words(without[-1]), 1)
    buried = without[:around]
    buried.insert(rng.randint(0, len(buried)), row.answer)
    return BuriedRow(
        row=row,
        buried=row.model_copy(update={"answer": "\n\n".join(buried)}),
        without=row.model_copy(update={"answer": "\n\n".join(without), "harmful": False}),
    )
