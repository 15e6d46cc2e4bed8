"""Bootstrap intervals of rates that have no closed one (Efron and Tibshirani 1993, percentile method).

All samples are drawn and measured as arrays, some hundred at a time, so that 13,000 rows take about a second.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mllm_protector_guard.ece import ECE_BINS, ece_bin

__all__ = ["bootstrap"]

_CELLS_AT_ONCE = 2_000_000


def bootstrap(
    truth: np.ndarray, scores: np.ndarray, *, threshold: float, false_alarm_share: float, samples: int
) -> dict[str, tuple[float, float]]:
    """The 2.5 and 97.5 percentiles of f1, auprc, recall_at_1pct_fpr and ece over samples of the rows.

    Args:
        truth: bool [rows], True for harmful; both classes are there.
        scores: float64 [rows], in [0, 1].
        threshold: At which f1 is read.
        false_alarm_share: At which recall_at_1pct_fpr is read.
        samples: How many are drawn.
    """
    # Rows of one score are one step of every curve: the samples are counted over the distinct scores, highest first.
    steps, step_of_row = np.unique(-scores, return_inverse=True)
    steps = -steps
    first_of_bin = np.flatnonzero(np.diff(ece_bin(steps), prepend=ECE_BINS))
    flagged = int((steps >= threshold).sum())
    found: dict[str, list[np.ndarray]] = {"f1": [], "auprc": [], "recall_at_1pct_fpr": [], "ece": []}
    for harmful, harmless in _samples(truth, step_of_row.ravel(), len(steps), samples):
        hits, alarms = harmful.cumsum(axis=1), harmless.cumsum(axis=1)
        positives, negatives = hits[:, -1:], alarms[:, -1:]
        precision = _divided(hits, hits + alarms)
        recall = _divided(hits, positives)
        called = (hits[:, flagged - 1] + alarms[:, flagged - 1]) if flagged else np.zeros(len(hits))
        right = hits[:, flagged - 1] if flagged else np.zeros(len(hits))
        found["f1"].append(_divided(2 * right, positives[:, 0] + called))
        found["auprc"].append(_divided((harmful * precision).sum(axis=1), positives[:, 0]))
        allowed = alarms <= false_alarm_share * negatives
        found["recall_at_1pct_fpr"].append(np.where(allowed, recall, 0.0).max(axis=1))
        gaps = np.add.reduceat(harmful * (1 - steps) - harmless * steps, first_of_bin, axis=1)
        found["ece"].append(np.abs(gaps).sum(axis=1) / len(scores))
    return {name: _percentiles(np.concatenate(values)) for name, values in found.items()}


def _samples(
    truth: np.ndarray, step_of_row: np.ndarray, steps: int, samples: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each step was drawn as a harmful and as a harmless row, two of float64 [samples, steps] at a time."""
    rng = np.random.default_rng(0)
    cells = step_of_row + np.where(truth, 0, steps)
    at_once = max(1, min(samples, _CELLS_AT_ONCE // len(truth)))
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        drawn = cells[rng.integers(0, len(truth), size=(count, len(truth)))]
        drawn += np.arange(count)[:, None] * (2 * steps)
        table = np.bincount(drawn.ravel(), minlength=count * 2 * steps).reshape(count, 2 * steps).astype(np.float64)
        yield table[:, :steps], table[:, steps:]


def _divided(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where the whole is 0: a sample without the class finds nothing."""
    whole = np.broadcast_to(whole, part.shape)
    quotient: np.ndarray = np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)
    return quotient


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
