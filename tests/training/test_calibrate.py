"""Temperature and threshold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mllm_protector_guard import ConfigError
from mllm_protector_guard.training.calibrate import choose_threshold, fit_temperature

probabilities = st.floats(0.0, 1.0)


class TestFitTemperature:
    @pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
    def test_it_finds_the_temperature_that_made_the_labels(self, true):
        random = np.random.default_rng(0)
        logits = random.normal(0.0, 4.0, 20_000)
        harmful = random.random(20_000) < 1.0 / (1.0 + np.exp(-logits / true))
        assert fit_temperature(logits, harmful) == pytest.approx(true, rel=0.1)

    def test_too_sure_a_detector_is_cooled_down(self):
        assert fit_temperature(np.array([8.0, 8.0, 8.0, -8.0]), np.array([True, True, False, False])) > 2.0


class TestChooseThreshold:
    def test_it_separates_what_can_be_separated(self):
        scores, harmful = np.array([0.1, 0.2, 0.7, 0.9]), np.array([False, False, True, True])
        threshold = choose_threshold(scores, harmful, np.array([]), 0.02)
        assert 0.2 < threshold <= 0.7

    def test_benign_answers_push_it_up(self):
        scores, harmful = np.array([0.1, 0.4, 0.7, 0.9]), np.array([False, True, True, True])
        threshold = choose_threshold(scores, harmful, np.array([0.5, 0.6, 0.1]), 0.02)
        assert 0.6 < threshold <= 0.7

    def test_benign_answers_may_exceed_it_as_often_as_allowed(self):
        scores, harmful = np.array([0.1, 0.4, 0.7, 0.9]), np.array([False, True, True, True])
        benign = np.append(np.linspace(0.0, 0.3, 99), 0.95)
        assert 0.3 < choose_threshold(scores, harmful, benign, 0.02) <= 0.4

    def test_without_a_harmful_row_there_is_none(self):
        with pytest.raises(ConfigError, match="no harmful row"):
            choose_threshold(np.array([0.5]), np.array([False]), np.array([]), 0.02)

    @given(
        scores=arrays.arrays(np.float64, st.integers(1, 30), elements=probabilities),
        benign=arrays.arrays(np.float64, st.integers(0, 60), elements=st.floats(0.0, 0.999)),
        max_fpr=st.floats(0.001, 0.5),
        seed=st.integers(0, 9),
    )
    def test_the_bound_is_kept(self, scores, benign, max_fpr, seed):
        harmful = np.random.default_rng(seed).random(scores.size) < 0.5
        harmful[0] = True
        threshold = choose_threshold(scores, harmful, benign, max_fpr)
        assert 0.0 < threshold < 1.0
        if benign.size:
            assert (benign >= threshold).mean() <= max_fpr

    def test_benign_answers_that_score_one_still_give_a_threshold(self, caplog):
        threshold = choose_threshold(np.array([0.2, 0.8]), np.array([False, True]), np.ones(5), 0.02)
        assert 0.0 < threshold < 1.0
        assert "no threshold" in caplog.text
