"""Errors of scores as probabilities, and temperatures that are checked on other rows than those they come from."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from mllm_protector_guard import ConfigError
from mllm_protector_guard.training.calibrate import FprBound, to_log_odds, to_scores
from mllm_protector_guard.training.recalibrate import LabelledScores, detection_rates, recalibrate
from mllm_protector_guard.training.reliability import cross_fit, measure_reliability, question_folds


def overconfident(rows, *, by=2.0, seed=0):
    """Log odds that are `by` times too large, and labels."""
    random = np.random.default_rng(seed)
    true = random.normal(0.0, 2.0, rows)
    return true * by, random.random(rows) < to_scores(true)


class TestMeasures:
    def test_ece_by_hand(self):
        # Bins of 1/15: 0.01 and 0.05 share the first, 0.97 and 1.0 the last.
        scores = np.array([0.01, 0.05, 0.5, 0.97, 1.0 - 1e-6])
        harmful = np.array([False, True, True, True, True])
        expected = (abs(0.06 - 1) + abs(0.5 - 1) + abs(1.97 - 2)) / 5
        assert measure_reliability(to_log_odds(scores), harmful).ece == pytest.approx(expected, abs=1e-6)

    def test_the_other_two_are_those_of_the_library(self):
        log_odds, harmful = overconfident(500)
        measured = measure_reliability(log_odds, harmful)
        assert measured.brier == pytest.approx(brier_score_loss(harmful, to_scores(log_odds)))
        assert measured.nll == pytest.approx(log_loss(harmful, to_scores(log_odds)))
        assert (measured.rows, measured.harmful) == (500, harmful.sum())

    def test_true_probabilities_have_nearly_no_ece_and_wrong_ones_have(self):
        log_odds, harmful = overconfident(20_000)
        assert measure_reliability(log_odds / 2.0, harmful).ece < 0.015
        assert measure_reliability(log_odds, harmful).ece > 0.05

    def test_rates_are_left_open_where_nothing_defines_them(self):
        flagged, harmful = np.array([True, True, False, False]), np.array([True, False, True, False])
        assert detection_rates(flagged, harmful) == {"recall": 0.5, "precision": 0.5, "f1": 0.5, "fpr": 0.5}
        assert detection_rates(flagged[:0], harmful[:0]) == dict.fromkeys(["recall", "precision", "f1", "fpr"])


class TestCrossFit:
    def test_no_row_sees_a_temperature_from_its_own_question(self):
        log_odds, harmful = overconfident(200)
        questions = [index // 4 for index in range(200)]
        before = cross_fit(log_odds, harmful, questions)
        asked = np.array(questions) == 7
        after = cross_fit(log_odds, np.where(asked, ~harmful, harmful), questions)
        assert np.array_equal(before[asked], after[asked])
        assert not np.array_equal(before, after)
        assert len(np.unique(before)) == 5

    def test_each_question_is_in_one_fold(self):
        questions = [None, "a", "a", "b", "c", "c", "c", "d", "e", "e"] * 3
        folds = question_folds(np.arange(30) % 2 == 0, questions)
        assert sorted(np.concatenate([fold for _, fold in folds])) == list(range(30))
        held_out = [{questions[row] for row in fold} for _, fold in folds]
        assert sum(map(len, held_out)) == 6

    def test_too_few_questions_or_labels_are_refused(self):
        with pytest.raises(ConfigError, match="4 questions"):
            question_folds(np.array([True, False] * 10), [0, 1, 2, 3] * 5)
        with pytest.raises(ConfigError, match="0 harmful and 10 harmless"):
            question_folds(np.zeros(10, dtype=bool), range(10))
        with pytest.raises(ConfigError, match="several of both"):
            question_folds(np.arange(10) == 0, range(10))


class TestRecalibrate:
    @staticmethod
    def labelled(rows=600, by=2.0, seed=0):
        log_odds, harmful = overconfident(rows, by=by, seed=seed)
        words = np.resize([10, 50, 200, 201], rows)
        return LabelledScores(scores=to_scores(log_odds), harmful=harmful, questions=tuple(range(rows)), words=words)

    def test_too_sure_scores_are_cooled_down_and_err_less_on_other_questions(self):
        result = recalibrate(np.linspace(0.0, 0.9, 99), self.labelled(), FprBound(kind="conformal"))
        fit = result.fit
        assert fit.lowest <= fit.temperature <= fit.highest
        assert fit.temperature == result.factor == pytest.approx(2.0, rel=0.15)
        everything, *lengths = fit.reliability
        for error in ("ece", "brier", "nll"):
            assert getattr(everything.after, error) < getattr(everything.before, error)
        assert [(one.words, one.before.rows) for one in lengths] == [("< 50", 150), ("50–200", 300), ("> 200", 150)]

    def test_the_temperature_moves_the_threshold_and_not_what_is_flagged(self):
        safe, bound = np.linspace(0.0, 0.9, 199), FprBound(kind="conformal", max_fpr=0.05)
        plain = recalibrate(safe, None, bound)
        cooled = recalibrate(safe, self.labelled(), bound)
        foreign = recalibrate(safe, self.labelled(), bound, rescale=False)
        assert plain.safe_flagged == cooled.safe_flagged == foreign.safe_flagged == 9
        assert plain.fit is None
        assert cooled.threshold < plain.threshold
        assert np.array_equal(cooled.rescored(safe) >= cooled.threshold, safe >= plain.threshold)
        assert (foreign.threshold, foreign.factor) == (plain.threshold, 1.0)
        assert foreign.fit == cooled.fit

    def test_f1_may_raise_the_threshold_and_never_lower_it(self):
        low, high = np.full(99, 0.01), np.full(99, 0.99)
        bound = FprBound(kind="conformal")
        raised = recalibrate(low, self.labelled(), bound, prefer="f1")
        assert raised.threshold > recalibrate(low, self.labelled(), bound).threshold
        kept = recalibrate(high, self.labelled(), bound, prefer="f1")
        assert kept.threshold >= recalibrate(high, self.labelled(), bound).threshold

    def test_a_safe_answer_without_a_score_is_counted_as_flagged(self):
        result = recalibrate(np.append(np.full(99, 0.1), np.inf), None, FprBound(kind="conformal", max_fpr=0.02))
        assert result.safe_flagged == 1

    def test_labels_that_the_scores_say_nothing_about_are_refused(self):
        random = np.random.default_rng(0)
        inverted = self.labelled(by=1.0)
        wrong = LabelledScores(
            scores=1.0 - inverted.scores, harmful=inverted.harmful, questions=inverted.questions, words=inverted.words
        )
        with pytest.raises(ConfigError, match="polarity"):
            recalibrate(random.random(99) / 2, wrong, FprBound(kind="conformal"))
