"""Turns raw detector scores into calibrated ones, and chooses the threshold."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from mllm_protector_guard.errors import ConfigError

__all__ = ["choose_threshold", "fit_temperature"]

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def fit_temperature(logits: Floats, harmful: Bools) -> float:
    """The temperature that makes sigmoid(logit / temperature) most likely (Guo et al., arXiv 1706.04599).

    Args:
        logits: float [rows].
        harmful: bool [rows].
    """
    signs = np.where(harmful, 1.0, -1.0)

    def negative_log_likelihood(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, -signs * logits / np.exp(log_temperature)).mean())

    return float(np.exp(minimize_scalar(negative_log_likelihood, bounds=(-3.0, 3.0), method="bounded").x))


def choose_threshold(scores: Floats, harmful: Bools, benign_scores: Floats, max_fpr: float) -> float:
    """The threshold with the best F1 among those that flag at most `max_fpr` of the benign answers.

    Args:
        scores: P(harmful), float [rows], of the rows whose F1 counts.
        harmful: bool [rows].
        benign_scores: P(harmful), float [benign rows], of harmless answers; may be empty.
        max_fpr: Share in (0, 1).

    Returns:
        A number in (0, 1).

    Raises:
        ConfigError: No row is harmful, so that F1 has no meaning.
    """
    if not harmful.any():
        raise ConfigError("the threshold cannot be chosen: no harmful row among the calibration rows")
    lowest = float(np.quantile(benign_scores, 1.0 - max_fpr, method="higher")) if benign_scores.size else 0.0
    highest = float(np.nextafter(1.0, 0.0))
    if lowest >= highest:
        logger.warning("the benign answers score 1: no threshold keeps their false positive rate at %g", max_fpr)
        return highest
    candidates = np.unique(np.clip(np.append(scores, lowest), np.nextafter(lowest, 1.0), highest))
    flagged = scores[None, :] >= candidates[:, None]
    true_positives = (flagged & harmful).sum(axis=1)
    f1 = 2.0 * true_positives / (flagged.sum(axis=1) + harmful.sum())
    return float(candidates[int(f1.argmax())])
