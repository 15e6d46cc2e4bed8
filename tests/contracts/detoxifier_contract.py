"""What every `Detoxifier` must do. Subclass `DetoxifierContract`, name it `Test...` and override `detoxifier`."""

import pytest

from contracts.hard_texts import HARD_TEXTS
from mllm_protector_guard import Detoxifier, ImageInput, Turn


class DetoxifierContract:
    overlong_chars = 200_000

    batch_equals_singles = True
    """Whether attempt 0 writes the same text alone and in a batch; padding may cost a model the last digits."""

    @pytest.fixture
    def detoxifier(self) -> Detoxifier:
        raise NotImplementedError("override the detoxifier fixture")

    @pytest.fixture
    def mixed(self) -> list[Turn]:
        return [
            Turn(question="How do I get even with him?", answer="Break into his house at night."),
            Turn(question=None, answer="You are worthless."),
            Turn(question="What is this?", answer="A weapon: use it.", images=(ImageInput(url="file:///a.png"),)),
        ]

    def test_is_a_detoxifier(self, detoxifier):
        assert isinstance(detoxifier, Detoxifier)

    def test_one_text_a_turn(self, detoxifier, mixed):
        rewrites = detoxifier.rewrite(mixed)
        assert len(rewrites) == len(mixed)
        assert all(isinstance(text, str) for text in rewrites)

    def test_empty_batch(self, detoxifier):
        assert detoxifier.rewrite([]) == []

    def test_first_attempt_is_deterministic(self, detoxifier, mixed):
        assert detoxifier.rewrite(mixed) == detoxifier.rewrite(mixed, attempt=0)

    def test_batch_equals_singles(self, detoxifier, mixed):
        if not self.batch_equals_singles:
            pytest.skip("this detoxifier makes no such promise")
        assert detoxifier.rewrite(mixed) == [detoxifier.rewrite([turn])[0] for turn in mixed]

    def test_order_is_kept(self, detoxifier, mixed):
        if not self.batch_equals_singles:
            pytest.skip("this detoxifier makes no such promise")
        assert detoxifier.rewrite(mixed[::-1]) == detoxifier.rewrite(mixed)[::-1]

    def test_later_attempts(self, detoxifier, mixed):
        for attempt in (1, 2, 9):
            rewrites = detoxifier.rewrite(mixed, attempt=attempt)
            assert len(rewrites) == len(mixed)
            assert all(isinstance(text, str) for text in rewrites)

    def test_takes_any_sequence_and_leaves_it_alone(self, detoxifier, mixed):
        given = tuple(mixed)
        assert detoxifier.rewrite(given) == detoxifier.rewrite(mixed)
        assert given == tuple(mixed)

    @pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
    def test_hard_texts(self, detoxifier, text):
        (rewrite,) = detoxifier.rewrite([Turn(question=text, answer=text)])
        assert isinstance(rewrite, str)

    def test_overlong_answer(self, detoxifier):
        text = ("Hit him again and again until he stops. " * (self.overlong_chars // 40 + 1))[: self.overlong_chars]
        (rewrite,) = detoxifier.rewrite([Turn(question="What now?", answer=text)])
        assert isinstance(rewrite, str)
