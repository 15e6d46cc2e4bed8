"""Where a growing text is cut: sentence and line ends of many scripts, else size, and never within a character."""

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector_guard.sentences import Cut, Cutter, open_fence

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
# Text in which the rules have something to do.
WORDS = ["A", "b", "Dr", "1", "3.5", "好", "e\u0301", "मैं", "가", "👩\u200d🔬", "🇩🇪"]
MARKS = [".", "!", "...", "。", "？", "।", "”", '"', ")", "```", "~~~", " ", "  ", "\n", "\r\n"]
HALVES = ["\u0301", "\u200d", "\u1161", "🇩", "\ud83d", "\ude00"]
PROSE = st.lists(st.sampled_from(WORDS + MARKS + HALVES), max_size=80).map("".join)
TEXTS = st.one_of(PROSE, ANY_TEXT)


def cuts_of(text, *, min_size=0, max_size=10_000, sentences=True, pieces=None):
    cutter = Cutter(min_size=min_size, max_size=max_size, sentences=sentences)
    return [cut for piece in pieces or [text] for cut in cutter.add(piece)]


def parts(text, **sizes):
    places = [0, *(cut.chars for cut in cuts_of(text, **sizes)), len(text)]
    return [text[start:stop] for start, stop in pairwise(places)]


def size_of(text):
    return len(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rains. ", "Take a coat! ", "Why? ", "Well... ", "Go"],
        ['"Go!" he said. ', '"Really?" ', "(Yes.) ", "**Fine.** ", "Good"],
        ["你好。", "今天很好！", "“去吗？”", "他说：好。", "Then it 停了。", "end"],
        ["今日は。", "「はい。」", "次。"],
        ["안녕하세요. ", "날씨가 좋네요! ", "네"],
        ["मैं ठीक हूँ। ", "तुम कैसे हो? ", "अच्छा"],
        ["كيف حالك؟ ", "بخير. ", "شكرا"],
        ["Как дела? ", "В г. Томске в 19.30. ", "Да"],
        ["ሰላም። ", "እንዴት ነህ፧ ", "ደህና"],
        ["« Bonjour ! » dit-il. ", "Il part. ", "Bien"],
        ["Das kostet 3.50 Euro, z.B. hier. ", "Und Dr. Weiß sagt ja. ", "Gut"],
        ["¿Qué tal? ", "Bien, Sr. Ruiz. ", "Vale"],
    ],
    ids=lambda sentences: sentences[0].strip(),
)
def test_sentences_of_many_scripts(sentences):
    assert parts("".join(sentences)) == sentences


@pytest.mark.parametrize(
    "text",
    [
        "See e.g. Smith, Dr. Who, Mr. T and J. R. R. Tolkien",
        "The U.S. Army, Fig. 3 and No. 5 of Vol. 2",
        "It is 3.14, 1.000.000 or example.com/a.b?c=d",
        'He asked "why?" and left',
        "Wait... what",
        "i.e. nothing",
        "1. one",
        "Hello world.",
        "你好。",
        "你好。”",
        "no end. ",
        "   \n\n  leading space",
    ],
)
def test_no_sentence_ends_within(text):
    assert parts(text) == [text]


def test_lists_and_paragraphs_are_cut_at_line_ends():
    lines = ["Take:\n\n", "1. One cup of tea\n", "2. Milk. ", "No sugar\n", "- a spoon\n  ", "* a plate\r\n", "And sit"]
    assert parts("".join(lines)) == lines


def test_code_is_cut_at_line_ends_only():
    lines = ["Run it. ", "Now:\n", "```python\n", "print('a. B! C? 好。D')\n\n    ", "x = 1. # Go. Now\n", "```\n"]
    assert parts("".join([*lines, "Good. ", "Bye"])) == [*lines, "Good. ", "Bye"]


def test_short_sentences_stay_with_the_next():
    assert parts("Go. Go. Go. That will not do. Yes. Fine", min_size=10) == [
        "Go. Go. Go. ",
        "That will not do. ",
        "Yes. Fine",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdefghij", ["abcd", "efgh", "ij"]),
        ("ab cdefg hi", ["ab ", "cdef", "g hi"]),
        ("好好好", ["好好", "好"]),
        ("สวัสดี ครับ", ["สวั", "สดี ", "ครั", "บ"]),
        ("aaae\u0301\u0301a", ["aaae\u0301\u0301", "a"]),
        ("aaa\ud83d\ude00b", ["aaa\ud83d\ude00", "b"]),
        ("👩🏽\u200d🔬👩🏽\u200d🔬", ["👩🏽\u200d🔬", "👩🏽\u200d🔬"]),
        ("🇩🇪🇫🇷", ["🇩🇪", "🇫🇷"]),
        ("\u1112\u1161\u11ab\u1100\u1173\u11af", ["\u1112\u1161\u11ab", "\u1100\u1173\u11af"]),
        ("❤️\u200d🔥❤️\u200d🔥", ["❤️\u200d🔥", "❤️\u200d🔥"]),
        ("aaaa        b", ["aaaa        ", "b"]),
    ],
)
def test_text_without_an_end_is_cut_by_size_between_characters(text, expected):
    assert parts(text, max_size=4, sentences=False) == expected
    assert parts(text, max_size=4) == expected


def test_a_cut_by_size_prefers_the_last_gap_of_the_second_half():
    text = "every word of this line stays whole " * 4
    found = parts(text, max_size=40, sentences=False)
    assert "".join(found) == text
    assert all(part.endswith(" ") for part in found)
    assert all(20 <= len(part) <= 46 for part in found[:-1])


@given(TEXTS, st.data(), st.integers(0, 40), st.integers(1, 60), st.booleans())
def test_cuts_depend_on_the_text_alone(text, data, min_size, max_size, sentences):
    sizes = {"min_size": min_size, "max_size": max_size, "sentences": sentences}
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    pieces = [text[start:stop] for start, stop in pairwise(places)] or [""]
    expected = cuts_of(text, **sizes)
    assert cuts_of(text, pieces=pieces, **sizes) == expected
    assert cuts_of(text, pieces=list(text) or [""], **sizes) == expected
    # More text adds cuts and changes none.
    shorter = cuts_of(text[: len(text) // 2], **sizes)
    assert expected[: len(shorter)] == shorter


@given(TEXTS, st.integers(0, 40), st.integers(1, 60), st.booleans())
def test_cuts_are_in_order_and_within_no_character(text, min_size, max_size, sentences):
    cuts = cuts_of(text, min_size=min_size, max_size=max_size, sentences=sentences)
    assert [cut.chars for cut in cuts] == sorted({cut.chars for cut in cuts})
    for cut in cuts:
        before, after = text[: cut.chars], text[cut.chars :]
        assert cut == Cut(len(before), size_of(before))
        assert before.strip()
        assert not after[0].isspace()
        assert not unicodedata.category(after[0]).startswith("M")
        assert not ("\ud800" <= before[-1] <= "\udbff" and "\udc00" <= after[0] <= "\udfff")
        assert not (before[-1] == "\u200d" and after[0] == "🔬")


@given(st.text(st.sampled_from("abc好 .\n"), max_size=300), st.integers(4, 40))
def test_no_piece_outgrows_the_size_by_more_than_space(text, max_size):
    for part in parts(text.strip(), max_size=max_size)[:-1]:
        assert size_of(part.rstrip()) < max_size + 4


@pytest.mark.parametrize(
    ("text", "fence"),
    [
        ("", ""),
        ("a `b` c", ""),
        ("```", "```"),
        ("a\n```py\nx", "```"),
        ("```py\nx\n```\n", ""),
        ("~~~~\n```\nx", "~~~~"),
        ("~~~~\n~~~\nx", "~~~~"),
        ("~~~~\n~~~~~  \nx", ""),
        ("```a`b", ""),
        ("    ```\nx", ""),
        ("```\n``` not an end\nx", "```"),
    ],
)
def test_open_code_blocks(text, fence):
    assert open_fence(text) == fence
