"""The promise of a calibrated threshold: exact on paper, kept in simulations, and not kept by the obvious way."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, norm

from mllm_protector_guard import ConfigError
from mllm_protector_guard.training.calibrate import (
    FprBound,
    as_threshold,
    best_f1_cut,
    guaranteed_cut,
    require_inner_temperature,
    to_log_odds,
    to_scores,
)

ROWS, REPETITIONS = 300, 2000
STRICT = FprBound(max_fpr=0.02, confidence=0.9)
kinds = st.sampled_from(["clopper-pearson", "conformal"])


def normal_scores(random, rows=ROWS):
    return to_scores(random.normal(size=rows))


def realised_fprs(cut_of, seed=0):
    """The true FPR of the cut that each of many samples leads to."""
    random = np.random.default_rng(seed)
    return np.array([norm.sf(cut_of(normal_scores(random))) for _ in range(REPETITIONS)])


class TestRows:
    @pytest.mark.parametrize(
        ("bound", "rows"),
        [
            (FprBound(), 299),
            (FprBound(max_fpr=0.05), 59),
            (FprBound(max_fpr=0.001), 2995),
            (FprBound(max_fpr=0.01, confidence=0.99), 459),
            (FprBound(kind="conformal"), 99),
            (FprBound(kind="conformal", max_fpr=0.07), 14),
            (FprBound(kind="conformal", max_fpr=0.6), 1),
        ],
    )
    def test_as_many_are_needed_as_the_books_say(self, bound, rows):
        assert bound.rows_needed() == rows

    @given(kind=kinds, max_fpr=st.floats(0.0005, 0.9), confidence=st.floats(0.05, 0.999))
    def test_one_row_less_would_not_do(self, kind, max_fpr, confidence):
        bound = FprBound(kind=kind, max_fpr=max_fpr, confidence=confidence)
        needed = bound.rows_needed()
        assert bound.flags_allowed(needed) >= 0
        assert bound.flags_allowed(needed - 1) < 0
        assert needed >= 1

    @pytest.mark.parametrize("hundredths", [7, 14, 28, 29, 56, 57, 58])
    def test_floating_point_takes_no_row_away(self, hundredths):
        assert FprBound(kind="conformal", max_fpr=hundredths / 100).flags_allowed(99) == hundredths - 1

    def test_too_few_are_refused_with_the_number_that_is_needed(self):
        with pytest.raises(
            ConfigError, match=r"298 safe answers are too few.* 299 for max_fpr 0.01 and confidence 0.95"
        ):
            guaranteed_cut(np.full(298, 0.1), FprBound())
        with pytest.raises(ConfigError, match=r"Give 1 more, .*conformal, which promises less and needs 99"):
            FprBound().require_rows(298)
        with pytest.raises(ConfigError, match=r"needs at least 99 for max_fpr 0\.01\. Give 99 more"):
            FprBound(kind="conformal").require_rows(0)

    @pytest.mark.parametrize("fields", [{"max_fpr": 0.0}, {"max_fpr": 1.0}, {"confidence": 1.0}, {"max_fpr": math.nan}])
    def test_numbers_out_of_range_are_refused(self, fields):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            FprBound(**fields)

    @given(rows=st.integers(1, 3000), max_fpr=st.floats(0.001, 0.5), confidence=st.floats(0.5, 0.999))
    def test_it_is_the_last_count_whose_clopper_pearson_limit_holds(self, rows, max_fpr, confidence):
        allowed = FprBound(max_fpr=max_fpr, confidence=confidence).flags_allowed(rows)
        if allowed >= 0:
            assert beta.ppf(confidence, allowed + 1, rows - allowed) <= max_fpr * (1 + 1e-9)
        if allowed + 1 < rows:  # with all rows flagged the limit is 1
            assert beta.ppf(confidence, allowed + 2, rows - allowed - 1) > max_fpr * (1 - 1e-9)


class TestPromise:
    def test_clopper_pearson_is_broken_no_more_often_than_said(self):
        fprs = realised_fprs(lambda scores: guaranteed_cut(scores, STRICT))
        assert (fprs > STRICT.max_fpr).mean() <= 1 - STRICT.confidence
        assert fprs.mean() > STRICT.max_fpr / 4  # it is not kept by flagging next to nothing

    def test_a_plain_quantile_breaks_it(self):
        def quantile(scores):
            return float(to_log_odds(np.quantile(scores, 1 - STRICT.max_fpr, method="higher")))

        fprs = realised_fprs(quantile)
        assert (fprs > STRICT.max_fpr).mean() > 3 * (1 - STRICT.confidence)

    def test_conformal_holds_on_average_and_not_for_each_draw(self):
        bound = FprBound(kind="conformal", max_fpr=0.02)
        fprs = realised_fprs(lambda scores: guaranteed_cut(scores, bound))
        assert fprs.mean() <= bound.max_fpr
        assert fprs.mean() > 0.8 * bound.max_fpr
        assert (fprs > bound.max_fpr).mean() > 0.2

    @pytest.mark.parametrize("kind", ["clopper-pearson", "conformal"])
    def test_ties_do_not_break_it(self, kind):
        values = np.linspace(0.05, 0.95, 12)
        shares = np.array([30, 20, 15, 10, 8, 6, 4, 3, 1.5, 1.2, 0.8, 0.5]) / 100
        bound = FprBound(kind=kind, max_fpr=0.02, confidence=0.9)
        random = np.random.default_rng(1)
        above, at = [], []
        for _ in range(REPETITIONS):
            scores = random.choice(values, size=ROWS, p=shares)
            threshold = as_threshold(guaranteed_cut(scores, bound), 1.0)
            tied = np.sort(scores)[ROWS - 1 - bound.flags_allowed(ROWS)]
            above.append(shares[values >= threshold].sum())
            at.append(shares[values >= tied].sum())
        if kind == "conformal":
            assert np.mean(above) <= bound.max_fpr < np.mean(at)
        else:
            assert np.mean(np.array(above) > bound.max_fpr) <= 0.1 < np.mean(np.array(at) > bound.max_fpr)

    def test_raising_it_for_f1_on_the_same_rows_does_not_break_it(self):
        random = np.random.default_rng(2)
        broken = 0
        for _ in range(500):
            safe = normal_scores(random)
            log_odds = np.append(to_log_odds(safe), random.normal(2.0, 1.0, 100))
            harmful = np.arange(log_odds.size) >= ROWS
            lowest = guaranteed_cut(safe, STRICT)
            cut = best_f1_cut(log_odds, harmful, lowest, 1.0)
            assert cut >= lowest
            broken += norm.sf(cut) > STRICT.max_fpr
        assert broken / 500 <= 1 - STRICT.confidence


class TestCut:
    @given(
        scores=st.lists(st.floats(0.0, 1.0), min_size=14, max_size=80),
        temperature=st.floats(0.2, 5.0),
        kind=kinds,
    )
    def test_no_more_are_flagged_than_allowed_at_any_temperature(self, scores, temperature, kind):
        bound = FprBound(kind=kind, max_fpr=0.2)
        try:
            threshold = as_threshold(guaranteed_cut(np.array(scores), bound), temperature)
        except ConfigError as error:
            assert any(word in str(error) for word in ("score 1", "would be 1"))  # noqa: PT017
            return
        assert 0.0 < threshold < 1.0
        rescored = to_scores(to_log_odds(np.array(scores)) / temperature).astype(np.float32)
        assert (rescored >= threshold).sum() <= bound.flags_allowed(len(scores))

    def test_it_lies_just_above_the_highest_answer_that_is_to_pass(self):
        scores = np.linspace(0.001, 0.5, 59)
        threshold = as_threshold(guaranteed_cut(scores, FprBound(max_fpr=0.05)), 1.0)
        assert 0.5 < threshold < 0.501

    def test_the_other_end_gets_a_threshold_too(self):
        assert 0.0 < as_threshold(guaranteed_cut(np.zeros(59), FprBound(max_fpr=0.05)), 0.1) < 1e-5

    def test_an_answer_without_a_score_counts_as_flagged(self):
        bound = FprBound(kind="conformal", max_fpr=0.2)  # of 9 answers one may be flagged
        assert to_scores(guaranteed_cut(np.array([0.1] * 8 + [np.inf]), bound)) < 0.11
        with pytest.raises(ConfigError, match="allows 1 flagged of 9"):
            guaranteed_cut(np.array([0.1] * 7 + [np.inf] * 2), bound)

    def test_scores_that_reach_1_leave_no_threshold(self):
        with pytest.raises(ConfigError, match="more than that score 1"):
            guaranteed_cut(np.append(np.full(90, 0.1), np.ones(10)), FprBound(max_fpr=0.05))
        with pytest.raises(ConfigError, match=r"temperature 0\.1 makes the scores too sure"):
            as_threshold(3.0, 0.1)


class TestBestF1:
    LOG_ODDS = np.array([-3.0, -1.0, 0.5, 1.0, 2.0, 3.0])

    def test_a_better_cut_above_is_taken(self):
        harmful = np.array([False, False, False, False, True, True])
        assert best_f1_cut(self.LOG_ODDS, harmful, -2.0, 1.0) == 1.5

    def test_a_better_cut_below_is_not(self):
        assert best_f1_cut(self.LOG_ODDS, np.array([False, True, True, True, True, True]), 0.7, 1.0) == 0.7

    def test_an_equal_one_is_not(self):
        assert best_f1_cut(self.LOG_ODDS, np.array([False, False, False, False, True, True]), 1.2, 1.0) == 1.2

    def test_one_that_would_round_to_1_is_not(self):
        harmful = np.array([False, False, False, False, True, True])
        assert best_f1_cut(self.LOG_ODDS, harmful, -2.0, 0.05) < 1.0


class TestInnerTemperature:
    def test_the_ends_of_the_search_are_no_fit(self):
        require_inner_temperature(1.3)
        with pytest.raises(ConfigError, match="almost without error"):
            require_inner_temperature(math.exp(-2.999))
        with pytest.raises(ConfigError, match="polarity"):
            require_inner_temperature(math.exp(2.999))
