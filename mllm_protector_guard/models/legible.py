"""The model's view of a text, in which invisible characters and disguised spelling have no power.

What leaves the guard is always the original text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from mllm_protector_guard.models.disguises import decoded, joined, unleeted
from mllm_protector_guard.models.lookalikes import without_lookalikes

__all__ = ["legible"]

# Each layer of encoded text is a quarter smaller than the text around it, so that 1 MB has fewer than 40 layers.
_MAX_LAYERS = 64
_HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]")
_WIDE_PUNCTUATION = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
_SELECTOR = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
_SELECTORS = re.compile(f"([{_SELECTOR}])[{_SELECTOR}]+")
_MARK = f"\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f{_SELECTOR}"
_MARKED = re.compile(f"([ -~\u00c0-\u024f\u1e00-\u1eff])([{_MARK}]+)")
_MOST_MARKS = 2
_MANY_STACKS = 3
# What makes an emoji of a digit.
_KEYCAP_MARKS = ("\ufe0f", "\u20e3", "\ufe0f\u20e3")
# Neither control nor format characters, and yet without a glyph.
_BLANK = frozenset("\u034f\u115f\u1160\u3164\uffa0\u17b4\u17b5\u180b\u180c\u180d\u180f")
# Compatibility characters that are signs of their own in ordinary text.
_SIGNS = frozenset("™℠ªº")


def legible(text: str, special_tokens: Iterable[str] = ()) -> str:
    """The model's view of a text; the view of a view is the same.

    - Lone surrogates become U+FFFD. NUL, other control characters and characters without a glyph (zero-width,
      bidirectional controls, soft hyphens) are left out; tag characters, which can spell hidden ASCII, become it.
    - Letters and digits in fullwidth, circled, mathematical and other compatibility forms become ordinary ones.
      Fullwidth punctuation stays in texts with Chinese, Japanese or Korean characters.
    - Marks stacked on Latin letters, or that no language puts there, are left out; accents stay.
    - Letters that only look like Latin ones (`lookalikes`), encoded text, letters spelled apart, and texts with digits
      and signs for letters (`disguises`) become what they stand for.
    - A special token spelled out in the text gets a space after its first character.
    """
    tokens = [token for token in special_tokens if len(token) > 1]
    for _ in range(_MAX_LAYERS):
        shown = _layer(text)
        for token in tokens:
            if token in shown:
                shown = shown.replace(token, f"{token[0]} {token[1:]}")
        if shown == text:
            break
        text = shown
    return text


def _layer(text: str) -> str:
    if not text.isascii():
        text = text.translate(_VIEW)
        if not _CJK.search(text):
            text = text.translate(_WIDE_PUNCTUATION)
        text = without_lookalikes(_without_stacks(_SELECTORS.sub(r"\1", text)))
    elif _HIDDEN.search(text):
        text = text.translate(_VIEW)
    return unleeted(joined(decoded(text)))


class _View(dict[int, str]):
    """A translation table that works out a character when it first meets it."""

    def __missing__(self, code: int) -> str:
        shown = self[code] = _legible_char(chr(code))
        return shown


_VIEW = _View()


def _legible_char(char: str) -> str:
    if char in "\n\t\r":
        return char
    if "\U000e0020" <= char <= "\U000e007e":
        return chr(ord(char) - 0xE0000)
    category = unicodedata.category(char)
    if category == "Cs":
        return "\ufffd"
    if category in ("Cc", "Cf") or char in _BLANK:
        return ""
    if category in ("Zl", "Zp"):
        return "\n"
    if (category == "Zs" and char != "\u3000") or char == "\u2800":
        return " "
    return char if char in _SIGNS else _plain_form(char)


def _plain_form(char: str) -> str:
    code = ord(char)
    # Regional indicators, negative circled, negative squared letters: Unicode gives them no compatibility form.
    for first in (0x1F1E6, 0x1F150, 0x1F170):
        if first <= code < first + 26:
            return chr(ord("A") + code - first)
    if 0x249C <= code <= 0x24B5:
        return chr(ord("a") + code - 0x249C)
    if 0x1F110 <= code <= 0x1F129:
        return chr(ord("A") + code - 0x1F110)
    if char in "＠＄":
        return chr(code - 0xFEE0)
    plain = unicodedata.normalize("NFKC", char)
    kind = unicodedata.decomposition(char).partition(">")[0]
    letters = plain.isascii() and plain.isalnum() and not plain.isdigit()
    if letters or (kind in ("<font", "<wide") and plain.isalnum() and len(plain) == 1):
        return plain
    return char


def _without_stacks(text: str) -> str:
    found = list(_MARKED.finditer(text))
    odd = sum(not _is_accent(match) for match in found)
    if not odd:
        return text
    # Among stacks, what looks like an accent is one of the stacked marks.
    stacked = odd >= _MANY_STACKS

    def bare(match: re.Match[str]) -> str:
        letter = unicodedata.normalize("NFD", match[1])[0] if stacked else match[1]
        return match[0] if not stacked and _is_accent(match) else letter

    return _MARKED.sub(bare, text)


def _is_accent(match: re.Match[str]) -> bool:
    letter, marks = match.groups()
    if letter in "#*0123456789":
        return marks in _KEYCAP_MARKS
    return len(marks) <= _MOST_MARKS and len(unicodedata.normalize("NFC", letter + marks[0])) == 1
