"""Spellings that hide a text from a model though a reader sees through them: codes, gaps, digits for letters."""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

__all__ = ["decoded", "joined", "unleeted"]

# Every repeat is possessive and every run that is long enough matches, so that no text is read twice.
_BASE64 = re.compile(
    r"(?:[A-Za-z0-9+/_-]{60,}+\r?\n)++[A-Za-z0-9+/_-]*+={0,2}|[A-Za-z0-9+/_-]{24,}+={0,2}",
)
_HEX = re.compile(r"(?<![0-9A-Za-z])(?:\\x|0x)?[0-9A-Fa-f]{2}(?:[ ,:]?(?:\\x|0x)?[0-9A-Fa-f]{2}){11,}+")
_HEX_SIGNS = re.compile(r"\\x|0x|[ ,:]")
_PERCENT = re.compile(r"(?:%[0-9A-Fa-f]{2}){4,}+")
_LEAST_LETTERS = 0.5


def decoded(text: str) -> str:
    """The text with runs of base64, hexadecimal and percent-encoded UTF-8 in the clear."""
    text = _BASE64.sub(_from_base64, text)
    text = _HEX.sub(lambda match: _clear(match, match[0], _from_hex), text)
    return _PERCENT.sub(lambda match: _clear(match, match[0], unquote_to_bytes), text) if "%" in text else text


def _from_base64(match: re.Match[str]) -> str:
    run = match[0]
    lines, _, last = run.rpartition("\n")
    clear = _clear(match, run, _base64_bytes)
    if clear != run or not lines:
        return clear
    # What follows the lines of a block may be no part of it.
    clear = _clear(match, lines, _base64_bytes)
    return run if clear == lines else f"{clear}\n{last}"


def _base64_bytes(run: str) -> bytes:
    run = "".join(run.split()).rstrip("=")
    return base64.b64decode(run + "=" * (-len(run) % 4), altchars=b"-_" if "-" in run or "_" in run else None)


def _from_hex(run: str) -> bytes:
    digits = _HEX_SIGNS.sub("", run)
    # Lists of numbers look like hexadecimal too; letters j to o and z need the digits a to f.
    return b"" if digits.isdigit() else bytes.fromhex(digits)


def _clear(match: re.Match[str], run: str, decode: Callable[[str], bytes]) -> str:
    """What the run stands for, or the run itself if that is no text."""
    try:
        clear = decode(run).decode()
    except ValueError:
        return run
    kinds = [unicodedata.category(char) for char in clear if char not in "\n\r\t"]
    shown = [kind for kind in kinds if kind not in ("Cf", "Mn", "Me")]
    letters = sum(kind[0] == "L" or kind == "Zs" for kind in shown)
    if {"Cc", "Cn", "Co"} & set(shown) or letters < max(_LEAST_LETTERS * len(shown), 1):
        return run
    # The clear text must not grow together with what stands beside it.
    text, start, end = match.string, match.start(), match.end()
    return " " * text[start - 1 : start].isalnum() + clear + " " * text[end : end + 1].isalnum()


_UNIT = r"[^\W_]|[-'’@$]"
_SPACED = re.compile(rf"(?<!\S)[^\W_][.,!?;:]?(?:\s++(?:{_UNIT})[.,!?;:]?){{3,}}(?!\S)")
_SPACED_UNIT = re.compile(r"(\S)([.,!?;:]?)(\s*)")
_BETWEEN = r"[-.·•*_~|/\\+=:;,^–—]"
_SPELLED = re.compile(
    rf"(?<!\S)([(\"'*]?)([^\W_](?:{_BETWEEN}{{1,2}}(?:[^\W_]|['’]))+){_BETWEEN}?([)\"'*.,!?;:]*)(?!\S)"
)
_SEPARATOR = re.compile(_BETWEEN)
# From so many letters on, a word spelled with separators is no abbreviation.
_SPELLED_WORD = 6
# A text is spelled apart from this share and number of its letters on.
_SPELLED_SHARE = 0.5
_SPELLED_LETTERS = 5
_SPACED_GAPS = 3
# Filler and tables of truth values hold fewer different letters.
_DISTINCT = 3
_MOSTLY = 0.5


def joined(text: str) -> str:
    """The text with words whose letters stand apart ("h o w", "h.o.w", "h_o_w") written together.

    Letters with spaces between them are words where the gaps tell so; gaps that are all alike tell nothing, and then
    the letters are one word.
    """
    text = _SPACED.sub(_unspaced, text)
    spelled = [match[2] for match in _SPELLED.finditer(text)]
    if not spelled:
        return text
    inside = sum(map(_letters, spelled))
    everywhere = inside >= max(_SPELLED_LETTERS, _SPELLED_SHARE * _letters(text))

    def together(match: re.Match[str]) -> str:
        word = _SEPARATOR.sub("", match[2])
        if _letters(word) <= _MOSTLY * len(word) or not (everywhere or _is_word(word)):
            return match[0]
        return match[1] + word + match[3]

    return _SPELLED.sub(together, text)


def _is_word(word: str) -> bool:
    return len(word) >= _SPELLED_WORD and len(set(word)) >= _DISTINCT


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def _unspaced(match: re.Match[str]) -> str:
    units = [unit.groups() for unit in _SPACED_UNIT.finditer(match[0])]
    letters = [char for char, _, _ in units if char.isalpha()]
    if len(letters) <= _MOSTLY * len(units) or len(set(letters)) < _DISTINCT:
        return match[0]
    narrow = min((len(gap) for _, stop, gap in units[:-1] if not stop and "\n" not in gap), default=0)
    parts: list[str] = []
    inside = 0
    for char, stop, gap in units:
        together = not stop and len(gap) == narrow and "\n" not in gap
        inside += together
        parts += char, stop, "" if together or not gap else gap if "\n" in gap else " "
    # Most letters of a list ("A, B, C or D") are followed by more than a gap.
    return "".join(parts) if inside >= max(_SPACED_GAPS, _MOSTLY * len(units) - 1) else match[0]


_LEET = str.maketrans("034567$@!89", "oeasgtsaibg")
_CHUNK = re.compile(r"\S+")
_BEFORE = "\"'()[]{}.,;:?*_~`"
_AFTER = _BEFORE + "!"
_PARTS = re.compile(r"([-'’])")
# Evidence: one digit or sign between letters, as hardly any name of a product or a unit is written.
_STRONG = re.compile(r"[A-Za-z][013457@$!][A-Za-z]")
_WORD = re.compile(r"[A-Za-z0134567@$!89]+")
_ORDINARY = re.compile(
    r"\d*1st|\d*2nd|\d*3rd|\d+(?:th|k|m|b|g|x|am|pm|kg|mg|ml|cm|mm|km|hz|gb|mb|kb|h|d|p|px|pt|em|ms|ft|lbs?|oz)?|\d+x\d*|mp[34]|[A-F0-9]+|[A-Z0-9]{1,4}"
)
# Words of digits and signs alone; read so only where most words are leet.
_NUMBER_WORDS = {
    "4": "a", "45": "as", "47": "at", "1": "i", "15": "is", "17": "it", "175": "its", "50": "so", "70": "to",
    "700": "too", "411": "all", "@": "a", "@$": "as", "!$": "is", "83": "be", "637": "get", "537": "set", "533": "see",
    "4150": "also", "8357": "best", "4813": "able", "7311": "tell", "57111": "still", "57341": "steal",
    "13641": "legal",
}  # fmt: skip
_ENDINGS = {"5": "s", "$": "s", "7": "t", "11": "ll"}
_HEAVY_SHARE = 0.3
_LONGEST_WORD = 30
# Capitals with a digit among them are a name (B1B, H1N1) up to this length.
_LONGEST_NAME = 4
_LEET_WORDS = 2
_LEET_SHARE = 0.2
# Weaker evidence, and so more of it: digits or signs anywhere in a word, save those of names in code ("list2", "$n").
_MIXED = re.compile(r"[A-Za-z][0134567@$!89]|[0134567@$!89][A-Za-z]")
_CODE_NAME = re.compile(r"[A-Za-z]+\d+|[$@][A-Za-z]+\d*")
_MIXED_WORDS = 3
_MIXED_SHARE = 0.25
# So many different leet words tell even in a long text.
_MANY_LEET_WORDS = 8
_MANY_LEET_SHARE = 0.05
# A 1 is an l rather than an i after the key and before one of the letters ("." is the edge of a word), by counts of
# letter triples in English text.
_ELL = {
    ".": "aeilouxyz", "a": ".abcefghijklmopqstuvwyz", "b": "aeiouy", "c": "ciouy", "d": "iy",
    "e": ".abcdefhiklmopsuwy", "f": "aiouy", "g": "aeiopuxy", "h": "iy", "i": ".abcdefghiklmoprstuvwy", "j": "p",
    "k": "aeiouyz", "l": ".aeiouwy", "m": ".ipy", "n": "iy", "o": ".abdefghiklmopstuvwy", "p": "abeiouy", "q": ".eist",
    "r": ".diwy", "s": "aeiy", "t": "iy", "u": ".abdefghiklmotuwy", "w": ".aeiy", "y": ".abefiklotuvy", "z": "eiy",
}  # fmt: skip


def unleeted(text: str) -> str:
    """The text with letters for the digits and signs in words such as "m4k3", if it is written so.

    It is if at least two of its words, and a fifth, have a digit or sign between letters, or eight and a twentieth; or
    if three, and a quarter, hold letters and digits in any order. Plain numbers, ordinals, amounts with units,
    addresses and code stay.
    """
    if not _MIXED.search(text):
        return text
    if text.isupper():
        lower = text.lower()
        plain = unleeted(lower)
        return text if plain == lower else plain.upper()
    words = [part for chunk in text.split() for part in _words(chunk) if any(map(str.isalpha, part))]
    mixed = [word for word in words if _is_mixed(word)]
    strong = [word for word in mixed if _STRONG.search(word)]
    if not (
        (len(strong) >= _LEET_WORDS and len(strong) >= _LEET_SHARE * len(words))
        or (len(set(strong)) >= _MANY_LEET_WORDS and len(strong) >= _MANY_LEET_SHARE * len(words))
        or (len(set(mixed)) >= _MIXED_WORDS and len(mixed) >= _MIXED_SHARE * len(words))
    ):
        return text
    heavy = len(mixed) >= _HEAVY_SHARE * len(words)
    return _CHUNK.sub(lambda match: _unleeted_chunk(match[0], heavy), text)


def _words(chunk: str) -> list[str]:
    """The words of a chunk of text without spaces; none if it is an address, a path or code."""
    parts = _PARTS.split(_core(chunk))[::2]
    return parts if all(len(part) <= _LONGEST_WORD and _WORD.fullmatch(part) for part in parts) else []


def _core(chunk: str) -> str:
    return chunk.lstrip(_BEFORE).rstrip(_AFTER)


def _is_mixed(word: str) -> bool:
    if word.isalpha() or _ORDINARY.fullmatch(word) or _CODE_NAME.fullmatch(word):
        return False
    return len(word) > _LONGEST_NAME or not word.isupper()


def _unleeted_chunk(chunk: str, heavy: bool) -> str:
    core = _core(chunk)
    if not core or core.isalpha() or not _words(chunk):
        return chunk
    # "1." counts, a bare "1" may be "I".
    if heavy and core in _NUMBER_WORDS and (core == chunk or len(core) > 1):
        shown = _NUMBER_WORDS[core]
    else:
        parts = _PARTS.split(core)
        if heavy and parts[1:2] in (["'"], ["’"]):
            # "17'5" is "it's", and "y0u'11" is "you'll".
            parts[0] = _NUMBER_WORDS.get(parts[0], parts[0])
            parts[2] = _ENDINGS.get(parts[2], parts[2])
        shown = "".join(map(_unleeted_word, parts))
    before, _, after = chunk.partition(core)
    return before + shown + after


def _unleeted_word(word: str) -> str:
    if word.isalpha() or not any(map(str.isalpha, word)) or _ORDINARY.fullmatch(word):
        return word
    if word[0] == "@" and len(word) > 4:
        return word
    shown = [*".", *word.replace("111", "ill").translate(_LEET), *"."]
    for at, char in enumerate(shown):
        if char == "1":
            # Two in a row are "ll" after a vowel, "li" in front and after an n, and else "il".
            before, after = shown[at - 1].lower(), shown[at + 1].lower()
            ell = after in _ELL.get(before, "") if after != "1" else before in ".naeiou"
            shown[at] = "l" if ell else "i"
    letters = "".join(shown[1:-1])
    return letters.upper() if word.isupper() else letters
