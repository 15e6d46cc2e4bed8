import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector_guard.evaluation.rewrites import (
    Distinctness,
    Distribution,
    Share,
    distinctness,
    ends_properly,
    first_sentence,
    longest_common_run,
    main_script,
    words,
)


class TestLongestCommonRun:
    def test_neighbours_count_and_not_what_is_merely_shared(self):
        assert longest_common_run(list("abcde"), list("xbcdyae")) == 3

    def test_nothing_in_common(self):
        assert longest_common_run(["a"], ["b"]) == 0
        assert longest_common_run([], ["b"]) == 0

    def test_frequent_elements_of_long_texts_count(self):
        # difflib ignores elements that are more than 1 % of a text of 200 or more, unless it is told not to.
        assert longest_common_run([1, 2] * 150, [1, 2] * 120) == 240

    @given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
    def test_as_by_trying_every_run(self, one, other):
        runs = {tuple(one[i:j]) for i in range(len(one)) for j in range(i + 1, len(one) + 1)}
        runs &= {tuple(other[i:j]) for i in range(len(other)) for j in range(i + 1, len(other) + 1)}
        assert longest_common_run(one, other) == max(map(len, runs), default=0)


def test_words_know_neither_case_nor_punctuation_and_keep_apostrophes():
    assert words("Don't STOP, (please) – 2 much!") == ["don't", "stop", "please", "2", "much"]


class TestEndsProperly:
    @pytest.mark.parametrize(
        "text",
        [
            "Water it well.",
            "Water it well!\n",
            'He said, "Water it."',
            "Water it (but not at noon.)",
            "**Water it.**",
            "先把豆子泡好。",
            "她说：“先泡好。”",
            "क्या यह ठीक है।",
            "Try this:\n- beans\n- peas",
            "Steps:\n1. soak\n2) plant them",
            "Run this:\n```\nprint(1)\n```",
        ],
    )
    def test_a_whole_text(self, text):
        assert ends_properly(text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "  \n",
            "Water it and",
            "Water it,",
            "Do this:",
            "It all depends...",
            'It all depends..."',
            "It all depends…",
            "Steps:\n1. soak\n2.",
            "Try:\n- beans\n-",
            "Try:\n- beans,",
            "Run this:\n```\nprint(1).",
            "The word is 'well'",
        ],
    )
    def test_a_cut_text(self, text):
        assert not ends_properly(text)


class TestFirstSentence:
    @pytest.mark.parametrize(
        ("text", "first"),
        [
            ("Soak the beans. Then plant.", "soak the beans."),
            ("  Soak\tthe  beans!  Then", "soak the beans!"),
            ("Use 3.5 cups, e.g., of rain water. Then", "use 3.5 cups, e.g., of rain water."),
            ('"Soak them." Then', '"soak them."'),
            ("先泡豆子。然后种。", "先泡豆子。"),
            ("A heading\nSoak them.", "a heading"),
            ("no end at all", "no end at all"),
            ("Really?! Yes.", "really?!"),
            ("", ""),
        ],
    )
    def test_is_what_comes_before_the_second(self, text, first):
        assert first_sentence(text) == first


def test_distinctness_counts_texts_that_begin_alike():
    texts = ["Hello. One.", "hello.  Two.", "HELLO. Three.", "Bye. One.", "bye. Two.", "Alone. One."]
    assert distinctness(texts) == Distinctness(repeated=5, commonest=3, texts=6)
    assert distinctness([]) == Distinctness(repeated=0, commonest=0, texts=0)


@pytest.mark.parametrize(
    ("text", "script"),
    [("Hello, 世界", "LATIN"), ("你好 AI", "CJK"), ("Привет, ok", "CYRILLIC"), ("12, 13!", None), ("", None)],
)
def test_the_script_is_that_of_most_letters(text, script):
    assert main_script(text) == script


class TestShare:
    def test_wilson_interval(self):
        # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662.
        share = Share(part=81, whole=263)
        assert share.share == pytest.approx(81 / 263)
        assert share.interval == pytest.approx((0.2553, 0.3662), abs=5e-5)

    def test_the_ends_stay_in_bounds(self):
        for part in (0, 10):
            low, high = Share(part=part, whole=10).interval
            assert 0.0 <= low <= part / 10 <= high <= 1.0
            assert high - low > 0.2

    def test_nothing_has_no_share(self):
        assert Share(part=0, whole=0).share is None
        assert Share(part=0, whole=0).interval is None


def test_distribution_gives_mean_and_quantiles():
    found = Distribution.of([float(value) for value in range(101)])
    assert found == Distribution(mean=50.0, low=5.0, high=95.0, values=101)
    assert Distribution.of([]) is None
