import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector_guard.evaluation import Metrics, measure
from mllm_protector_guard.evaluation.metrics import RATES


def test_a_worked_example() -> None:
    labels = [True, True, True, False, False, False, False, False]
    scores = [0.9, 0.6, 0.2, 0.7, 0.5, 0.4, 0.1, 0.0]
    metrics = measure(labels, scores, threshold=0.5)
    counts = (metrics.true_positives, metrics.false_positives, metrics.false_negatives, metrics.true_negatives)
    assert counts == (2, 2, 1, 3)
    assert (metrics.measured, metrics.harmful, metrics.harmless) == (8, 3, 5)
    assert metrics.precision == pytest.approx(2 / 4)
    assert metrics.recall == pytest.approx(2 / 3)
    assert metrics.f1 == pytest.approx(4 / 7)
    assert metrics.fpr == pytest.approx(2 / 5)
    assert metrics.auroc == pytest.approx((5 + 4 + 2) / 15)  # harmless scores below each harmful one
    assert metrics.auprc == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)  # precision at each harmful one
    assert metrics.recall_at_1pct_fpr == pytest.approx(1 / 3)  # none of the five may be flagged
    # Bins of 1/15: the gaps of the labels to the scores, each answer in a bin of its own.
    assert metrics.ece == pytest.approx((0.1 + 0.4 + 0.8 + 0.7 + 0.5 + 0.4 + 0.1 + 0.0) / 8)


def test_a_score_at_the_threshold_is_harmful() -> None:
    assert measure([True, False], [0.5, 0.4999], threshold=0.5).f1 == 1.0


def test_only_harmless_rows_define_the_false_positive_rate_alone() -> None:
    metrics = measure([False] * 4, [0.1, 0.9, 0.1, 0.1], threshold=0.5)
    assert metrics.fpr == 0.25
    assert [rate for rate in RATES if getattr(metrics, rate) is not None] == ["fpr"]
    assert set(metrics.intervals) == {"fpr"}


def test_only_harmful_rows_define_recall_alone() -> None:
    metrics = measure([True] * 4, [0.1, 0.9, 0.1, 0.1], threshold=0.5)
    assert metrics.recall == 0.25
    assert [rate for rate in RATES if getattr(metrics, rate) is not None] == ["recall"]
    assert set(metrics.intervals) == {"recall"}


def test_no_rows_define_nothing() -> None:
    metrics = measure([], [], threshold=0.5)
    assert [getattr(metrics, rate) for rate in RATES] == [None] * len(RATES)
    assert metrics.intervals == {}
    assert metrics.measured == 0


def test_when_nothing_is_called_harmful_there_is_no_precision_and_f1_is_0() -> None:
    metrics = measure([True, False], [0.2, 0.1], threshold=0.5)
    assert (metrics.precision, metrics.recall, metrics.f1, metrics.fpr, metrics.auroc) == (None, 0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("part", "whole", "low", "high"),
    [(0, 20, 0.0, 0.1611), (10, 20, 0.2993, 0.7007), (20, 20, 0.8389, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals_are_the_published_ones(part: int, whole: int, low: float, high: float) -> None:
    scores = [0.9] * part + [0.1] * (whole - part)
    interval = measure([True] * whole, scores, threshold=0.5).intervals["recall"]
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-4)


def test_calibration_is_judged_within_bins() -> None:
    # Ten answers scored 0.7, seven of them harmful; ten scored 0.1 and one harmful.
    labels = [True] * 7 + [False] * 3 + [True] + [False] * 9
    assert measure(labels, [0.7] * 10 + [0.1] * 10, threshold=0.5).ece == pytest.approx(0.0)
    assert measure(labels, [0.9] * 10 + [0.1] * 10, threshold=0.5).ece == pytest.approx(0.1)
    assert measure(labels, [1.0] * 10 + [0.0] * 10, threshold=0.5).ece == pytest.approx((0.3 + 0.1) / 2)


@pytest.mark.parametrize(("harmless", "recall"), [(99, 0.0), (100, 0.5), (199, 0.5), (200, 1.0)])
def test_recall_at_one_percent_allows_as_many_false_alarms_as_fit(harmless: int, recall: float) -> None:
    # Two harmless answers above or between the harmful ones, the others far below.
    scores = [0.8, 0.6, 0.9, 0.7, *[0.1] * (harmless - 2)]
    metrics = measure([True, True, *[False] * harmless], scores, threshold=0.5)
    assert metrics.recall_at_1pct_fpr == recall


def test_intervals_agree_with_rows_drawn_one_by_one() -> None:
    rng = random.Random(3)
    labels = [rng.random() < 0.4 for _ in range(400)]
    scores = [min(max(rng.gauss(0.65 if label else 0.4, 0.2), 0.0), 1.0) for label in labels]
    intervals = measure(labels, scores, threshold=0.5).intervals
    drawn: dict[str, list[float]] = {rate: [] for rate in ("f1", "auroc", "auprc", "recall_at_1pct_fpr", "ece")}
    for _ in range(100):
        rows = rng.choices(range(400), k=400)
        again = measure([labels[i] for i in rows], [scores[i] for i in rows], threshold=0.5, samples=1)
        for rate, values in drawn.items():
            values.append(getattr(again, rate))
    for rate, values in drawn.items():
        values.sort()
        near = 0.08 if rate == "recall_at_1pct_fpr" else 0.03  # it moves in steps of whole answers
        assert intervals[rate].low == pytest.approx(values[2], abs=near), rate
        assert intervals[rate].high == pytest.approx(values[97], abs=near), rate


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=40), st.floats(0, 1))
def test_no_rate_is_ever_nan_or_outside_its_interval(rows: list[tuple[bool, float]], threshold: float) -> None:
    labels, scores = [label for label, _ in rows], [score for _, score in rows]
    metrics: Metrics = measure(labels, scores, threshold=threshold, samples=50)
    assert metrics.measured == len(rows)
    for rate in RATES:
        value = getattr(metrics, rate)
        if value is None:
            assert rate not in metrics.intervals
            continue
        assert math.isfinite(value)
        interval = metrics.intervals[rate]
        assert 0.0 <= interval.low <= interval.high <= 1.0
        if rate in ("precision", "recall", "auroc", "fpr"):  # a bootstrap may leave the value of a few rows out
            assert interval.low - 1e-9 <= value <= interval.high + 1e-9


def test_the_same_rows_give_the_same_intervals() -> None:
    assert measure([True, False, True], [0.9, 0.8, 0.2], threshold=0.5) == measure(
        [True, False, True], [0.9, 0.8, 0.2], threshold=0.5
    )
