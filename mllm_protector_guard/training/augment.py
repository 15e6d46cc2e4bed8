"""Changes of detector rows that leave their label true, so that length, place and disclaimers tell nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["bury", "crop", "disclaim"]

_SHORTEST_CROP = 24

_BEFORE = (
    "As an AI language model, I do not condone this, but here is what you asked for.",
    "I can't encourage anything illegal. That said, purely hypothetically:",
    "This is for educational purposes only.",
    "Please note that this is unethical and may be against the law. Anyway:",
    "I'm sorry, but I can't assist with that. However, in a fictional setting it could go like this:",
    "Disclaimer: I am not responsible for what you do with this information.",
    "It is important to respect others and obey the law. With that said,",
    "Normally I would refuse, since this could hurt people. Here it is:",
    "[Normal] I cannot help with that.\n[Unlocked] Of course!",
    "I must remind you that this can have serious consequences.",
    "Sure! Just remember to stay safe and act responsibly.",
    "I understand your concern, and I want to be respectful to everyone.",
    "首先声明，以下内容仅供参考，请遵守法律。",
    "我不赞成这种做法，不过可以这样说：",
)
_AFTER = (
    "Remember that this is illegal and I do not recommend it.",
    "Please use this information responsibly.",
    "Note: this is only a hypothetical scenario, and you should never try it in real life.",
    "However, always consider the ethical side and seek professional advice.",
    "Of course, I am just an AI and this is not an endorsement.",
    "I hope this helps! Stay safe.",
    "It is important to act within the law at all times.",
    "以上内容仅供参考，切勿模仿。",
)


def disclaim(answer: str, rng: random.Random) -> str:
    """The answer with a disclaimer before it, after it, or both."""
    where = rng.choice(("before", "before", "after", "both"))
    parts = [answer]
    if where != "after":
        parts.insert(0, rng.choice(_BEFORE))
    if where != "before":
        parts.append(rng.choice(_AFTER))
    return rng.choice(("\n\n", "\n", " ")).join(parts)


def crop(tokens: list[int], rng: random.Random) -> list[int]:
    """The beginning of an answer, of random length, at least 24 tokens; a shorter answer whole."""
    return tokens[: rng.randint(_SHORTEST_CROP, len(tokens))] if len(tokens) > _SHORTEST_CROP else tokens


def bury(
    tokens: list[int], filler: Sequence[list[int]], separator: list[int], length: int, rng: random.Random
) -> list[int]:
    """The answer at a random place among others, each a paragraph, `length` tokens in all if they suffice.

    Args:
        tokens: Of the answer; all of them stay.
        filler: Harmless answers as token ids; parts of them are taken.
        separator: Token ids of what stands between two paragraphs.
        length: About how many tokens the result has.
        rng: Draws place and filler.
    """
    room = length - len(tokens)
    before = rng.randint(0, max(room, 0))
    first = _paragraphs(filler, separator, before, rng)
    second = _paragraphs(filler, separator, room - before, rng)
    return [*first, *(separator if first else ()), *tokens, *(separator if second else ()), *second]


def _paragraphs(filler: Sequence[list[int]], separator: list[int], length: int, rng: random.Random) -> list[int]:
    drawn: list[int] = []
    while len(drawn) < length:
        drawn += [*(separator if drawn else ()), *rng.choice(filler)]
    return drawn[: max(length, 0)]
