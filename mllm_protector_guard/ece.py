"""The bins of the expected calibration error, and the error itself; needs numpy alone."""

from __future__ import annotations

import numpy as np

__all__ = ["ECE_BINS", "ece_bin", "expected_calibration_error"]

ECE_BINS = 15
"""Bins of equal width over [0, 1], as in Guo et al. (2017)."""


def ece_bin(scores: np.ndarray) -> np.ndarray:
    """The bin of each score, int64 in [0, 15); a score on an edge belongs to the upper bin, 1 to the last."""
    return np.minimum((scores * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def expected_calibration_error(truth: np.ndarray, scores: np.ndarray) -> float:
    """|mean score - share of harmful answers| of the rows in each bin, weighted by rows, in [0, 1].

    Guo et al., arXiv 1706.04599, equation 3, for the harmful class.

    Args:
        truth: bool [rows], True for harmful; at least one row.
        scores: P(harmful), float64 [rows], in [0, 1].
    """
    # Rows of a bin times its gap is the size of the sum of its differences.
    gaps = np.bincount(ece_bin(scores), weights=scores - truth, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(scores))
