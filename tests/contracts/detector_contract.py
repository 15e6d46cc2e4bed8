"""What every `HarmDetector` must do. Subclass `DetectorContract`, name it `Test...` and override `detector`."""

import math

import pytest

from contracts.hard_texts import HARD_TEXTS
from mllm_protector_guard import HarmDetector, ImageInput, Turn


class DetectorContract:
    tolerance = 1e-4
    """How far the score of a turn in a batch may be from its score alone."""

    overlong_chars = 200_000

    @pytest.fixture
    def detector(self) -> HarmDetector:
        raise NotImplementedError("override the detector fixture")

    @pytest.fixture
    def mixed(self) -> list[Turn]:
        """Turns that are as different as possible in length and content."""
        return [
            Turn(question="How do I bake bread?", answer="Mix flour, water, salt and yeast, wait, and bake."),
            Turn(question=None, answer="No."),
            Turn(question="", answer="Here is how to hurt him: " + "take a knife and wait. " * 40),
            Turn(question="What is in the picture?", answer="A cat.", images=(ImageInput(content=b"\x89PNG"),)),
            Turn(question="q" * 3_000, answer="I can't help with that."),
        ]

    def test_is_a_detector(self, detector):
        assert isinstance(detector, HarmDetector)

    def test_scores_are_probabilities(self, detector, mixed):
        scores = detector.score(mixed)
        assert len(scores) == len(mixed)
        assert all(isinstance(score, float) and math.isfinite(score) and 0.0 <= score <= 1.0 for score in scores)

    def test_empty_batch(self, detector):
        assert detector.score([]) == []

    def test_batch_equals_singles(self, detector, mixed):
        singles = [detector.score([turn])[0] for turn in mixed]
        assert detector.score(mixed) == pytest.approx(singles, abs=self.tolerance)

    def test_order_is_kept(self, detector, mixed):
        forward = detector.score(mixed)
        backward = detector.score(mixed[::-1])
        assert backward == pytest.approx(forward[::-1], abs=self.tolerance)

    def test_is_deterministic(self, detector, mixed):
        assert detector.score(mixed) == detector.score(mixed)

    def test_takes_any_sequence_and_leaves_it_alone(self, detector, mixed):
        given = tuple(mixed)
        assert detector.score(given) == pytest.approx(detector.score(mixed), abs=self.tolerance)
        assert given == tuple(mixed)

    @pytest.mark.parametrize("where", ["answer", "question"])
    @pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
    def test_hard_texts(self, detector, text, where):
        turn = Turn(question="Why?", answer=text) if where == "answer" else Turn(question=text, answer="Because.")
        (score,) = detector.score([turn])
        assert 0.0 <= score <= 1.0

    @pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
    def test_hard_neighbours_change_nothing(self, detector, text):
        plain = Turn(question="Why?", answer="Because it rained.")
        alone = detector.score([plain])
        together = detector.score([Turn(question=text, answer=text), plain])
        assert together[1] == pytest.approx(alone[0], abs=self.tolerance)

    def test_overlong_answer(self, detector):
        text = ("The weather was mild and the garden grew. " * (self.overlong_chars // 42 + 1))[: self.overlong_chars]
        (score,) = detector.score([Turn(question="Tell me a story.", answer=text)])
        assert 0.0 <= score <= 1.0
