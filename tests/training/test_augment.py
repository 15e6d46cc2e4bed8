"""Changes of rows that must leave their label true."""

import random

from hypothesis import given
from hypothesis import strategies as st

from mllm_protector_guard.training.augment import bury, crop, disclaim

SEPARATOR = [-1]
# Filler has numbers of its own, so that what came from where can be told.
ANSWERS = st.lists(st.integers(0, 999), min_size=1, max_size=80)
FILLER = st.lists(st.lists(st.integers(1000, 1999), min_size=1, max_size=40), min_size=1, max_size=5)
DRAWS = st.integers(0, 2**32).map(random.Random)


class TestBury:
    @given(tokens=ANSWERS, filler=FILLER, length=st.integers(1, 300), rng=DRAWS)
    def test_the_answer_stays_whole_and_in_order(self, tokens, filler, length, rng):
        buried = bury(tokens, filler, SEPARATOR, length, rng)
        assert [token for token in buried if 0 <= token < 1000] == tokens
        start = buried.index(tokens[0])
        assert buried[start : start + len(tokens)] == tokens

    @given(tokens=ANSWERS, filler=FILLER, length=st.integers(1, 300), rng=DRAWS)
    def test_it_becomes_about_as_long_as_asked(self, tokens, filler, length, rng):
        buried = bury(tokens, filler, SEPARATOR, length, rng)
        # What is added to the length asked for are the separators beside the answer.
        wanted = max(length, len(tokens))
        assert wanted <= len(buried) <= wanted + 2 * len(SEPARATOR)

    @given(tokens=ANSWERS, filler=FILLER, length=st.integers(1, 300), rng=DRAWS)
    def test_paragraphs_stand_apart(self, tokens, filler, length, rng):
        buried = bury(tokens, filler, SEPARATOR, length, rng)
        start = buried.index(tokens[0])
        before, after = buried[:start], buried[start + len(tokens) :]
        assert not before or before[-1:] == SEPARATOR
        assert not after or after[:1] == SEPARATOR

    def test_the_answer_can_stand_anywhere(self):
        filler, tokens = [[1000] * 5], [7, 7, 7]
        places = {bury(tokens, filler, SEPARATOR, 40, random.Random(seed)).index(7) for seed in range(200)}
        assert len(places) > 20
        assert min(places) == 0

    def test_an_answer_that_is_long_enough_gets_nothing(self):
        assert bury([1] * 50, [[1000]], SEPARATOR, 50, random.Random(0)) == [1] * 50


class TestCrop:
    @given(tokens=st.lists(st.integers(0, 9), min_size=1, max_size=200), rng=DRAWS)
    def test_a_beginning_of_at_least_24_tokens_is_left(self, tokens, rng):
        cropped = crop(tokens, rng)
        assert tokens[: len(cropped)] == cropped
        assert min(len(tokens), 24) <= len(cropped) <= len(tokens)

    def test_both_bounds_are_reached(self):
        lengths = {len(crop(list(range(28)), random.Random(seed))) for seed in range(200)}
        assert lengths == {24, 25, 26, 27, 28}


class TestDisclaim:
    @given(answer=st.text(max_size=60), rng=DRAWS)
    def test_the_answer_stays_whole_beside_something_new(self, answer, rng):
        with_disclaimer = disclaim(answer, rng)
        assert answer in with_disclaimer
        assert len(with_disclaimer) > len(answer) + 10

    def test_it_comes_before_after_and_on_both_sides(self):
        places = set()
        for seed in range(100):
            before, after = disclaim("@", random.Random(seed)).split("@")
            places.add((bool(before), bool(after)))
        assert places == {(True, False), (False, True), (True, True)}
