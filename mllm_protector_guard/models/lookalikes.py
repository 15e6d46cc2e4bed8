"""Letters of other scripts that look like ASCII letters.

The pairs are those of the Unicode confusables table (UTS #39, confusables.txt) for living scripts in the Basic
Multilingual Plane; `_SIMILAR` adds what texts are disguised with besides: small capitals, phonetic letters,
and Cyrillic and Greek letters whose small forms look like small capitals.
"""

from __future__ import annotations

import re

__all__ = ["without_lookalikes"]

_SAME = {
    "A": "ΑАᎪᗅꓮ", "B": "ΒВᏴᗷꓐ", "C": "ϹСᏟⲤꓚ", "D": "Ꭰᗞᗪꓓ", "E": "ΕЕᎬꓰ", "F": "Ϝᖴꓝ", "G": "ԌᏀᏳꓖ", "H": "ΗНᎻᕼⲎꓧ",
    "I": "ΙІӀⲒꓲ", "J": "ͿЈᎫᒍꓙ", "K": "ΚКᏦⲔꓗ", "L": "ᏞᒪⳐꓡ", "M": "ΜϺМᎷᗰⲘꓟ", "N": "ΝⲚꓠ", "O": "ΟОՕⲞꓳ", "P": "ΡРᏢᑭⲢꓑ",
    "R": "ᎡᏒᖇꓣ", "S": "ЅՏᏕᏚꓢ", "T": "ΤТᎢⲦꓔ", "U": "Սᑌꓴ", "V": "ѴᏙᐯꓦ", "W": "ԜᎳᏔꓪ", "X": "ΧХⲬꓫ", "Y": "ΥУҮᎩᎽⲨꓬ",
    "Z": "ΖᏃꓜ",
    "a": "αа", "b": "ЬᏏᑲᖯ", "c": "ϲсⲥꮯ", "d": "ԁᏧᑯꓒ", "e": "еҽ", "f": "ք", "g": "ց", "h": "һհᏂ",
    "i": "ιіӏᎥꙇꭵ", "j": "ϳј", "n": "ոռ", "o": "οоօჿⲟ", "p": "ρрⲣ", "q": "ԛգզ", "s": "ѕꮪ", "u": "υս", "v": "νѵꮩ",
    "w": "ԝաꮃ", "x": "хᕁᕽ", "y": "γуүყ", "z": "ꮓ",
}  # fmt: skip

_SIMILAR = {
    "a": "ɑᴀªάӑӓ", "b": "ʙвьβ", "c": "ᴄҫ", "d": "ᴅ", "e": "ᴇεέєёѐэ", "f": "ꜰғƒ", "g": "ɡɢ", "h": "ʜнћђ",
    "i": "ɪıίϊїΐ", "j": "ᴊ", "k": "ᴋкκҝқ", "l": "ʟɭ", "m": "ᴍм", "n": "ɴпηήл", "o": "ᴏºόөӧ", "p": "ᴘ", "q": "ǫ",
    "r": "ʀгᴦяɾ", "s": "ꜱ", "t": "ᴛтτ", "u": "ᴜυύцɯ", "v": "ᴠʋ", "w": "ᴡшщωώѡ", "x": "χ", "y": "ʏўӯүγ", "z": "ᴢʐ",
    "A": "ΆӐӒ", "E": "ΈЁЀЄ", "I": "ΊЇΪ", "K": "Қ", "N": "ИЙ", "O": "ΌӦ", "R": "ЯƦ", "W": "Ш", "Y": "ΎЎ",
}  # fmt: skip


def _table(*parts: dict[str, str]) -> dict[int, str]:
    return {ord(char): letter for part in parts for letter, chars in part.items() for char in chars}


_EXACT = _table(_SAME)
_BROAD = _table(_SIMILAR, _SAME)
_ANY = re.compile("[" + "".join(map(chr, _BROAD)) + "]")
_WORD = re.compile(r"[^\W\d_]+")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+")
_SMALL_CAPITALS = re.compile("[A-Za-z\u1d00-\u1d22ʙɢʜɪʟɴʀʏꜰꜱ]+")
_SCRIPTS = re.compile(
    "[\u0370-\u052f\u0531-\u0587\u10d0-\u10ff\u13a0-\u13ff\u1400-\u167f\u1f00-\u1fff\u2c80-\u2cff\ua4d0-\ua4ff\uab70-\uabbf]"
)
# Letters without which hardly a sentence is written in the languages that have a dotless i.
_TURKIC = re.compile("[ğşəĞŞİƏ]")
# A text of a script holds far fewer look-alikes than this for each of its other letters.
_LOOKALIKES_PER_LETTER = 8
_ENOUGH = 12


def without_lookalikes(text: str) -> str:
    """The text in which words that only look like Latin ones are Latin.

    A word is changed if it mixes Latin letters with look-alikes and holds no other letters, or if it consists of
    look-alikes and the text has hardly any letters of their scripts that look like none. So texts in Russian, Greek or
    Cherokee stay as they are.
    """
    if not _ANY.search(text):
        return text
    dotless = "ı" if _TURKIC.search(text) else ""

    def latin(match: re.Match[str]) -> str:
        word = match[0]
        return word if word.isascii() or (dotless and dotless in word) else _latin_word(word)

    text = _WORD.sub(latin, text)
    foreign = "".join(_SCRIPTS.findall(text))
    alike = sum(ord(char) in _EXACT for char in foreign)
    ordinary = sum(map(len, _LATIN.findall(text)))
    if alike >= _LOOKALIKES_PER_LETTER * (len(foreign) - alike) and alike and (ordinary >= alike or alike >= _ENOUGH):
        text = _WORD.sub(_whole, text)
    return text


def _latin_word(word: str) -> str:
    shown = word.translate(_BROAD)
    if not _LATIN.fullmatch(shown):
        return word
    latin = sum(map(len, _LATIN.findall(word)))
    # Beside one Latin letter a sign like º or к may be what it is: a unit, a model, a slip of the keyboard.
    if latin > 1 or _SMALL_CAPITALS.fullmatch(word) or (latin and _LATIN.fullmatch(word.translate(_EXACT))):
        return shown
    return word


def _whole(match: re.Match[str]) -> str:
    word = match[0]
    # One small Greek letter in a Latin text is a variable.
    if word.isascii() or (len(word) == 1 and "α" <= word <= "ω" and word != "ο"):
        return word
    shown = word.translate(_EXACT)
    return shown if shown.isascii() else word
