"""How far scores can be taken as probabilities, measured on rows that the temperature was not fitted on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from mllm_protector_guard.ece import expected_calibration_error
from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.training.calibrate import (
    Bools,
    Floats,
    fit_temperature,
    require_inner_temperature,
    to_scores,
)

__all__ = ["FOLDS", "Reliability", "cross_fit", "measure_reliability", "question_folds"]

Rows = NDArray[np.intp]

FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """Three errors of P(harmful) against labels; lower is better.

    Attributes:
        rows: How many answers.
        harmful: How many of them are harmful.
        ece: Expected calibration error, [0, 1]; see `expected_calibration_error`.
        brier: Mean squared difference of score and label, [0, 1].
        nll: Mean negative log-likelihood, nats a row.
    """

    rows: int
    harmful: int
    ece: float
    brier: float
    nll: float


def measure_reliability(log_odds: Floats, harmful: Bools) -> Reliability:
    """The errors of sigmoid(log odds), of at least one row.

    Args:
        log_odds: float [rows].
        harmful: bool [rows].
    """
    scores, labels = to_scores(log_odds), harmful.astype(np.float64)
    return Reliability(
        rows=harmful.size,
        harmful=int(harmful.sum()),
        ece=expected_calibration_error(harmful, scores),
        brier=float(np.square(scores - labels).mean()),
        nll=float(np.logaddexp(0.0, np.where(harmful, -log_odds, log_odds)).mean()),
    )


def question_folds(harmful: Bools, questions: Sequence[Hashable]) -> list[tuple[Rows, Rows]]:
    """For each of the five folds the rows of the others and its own, int [rows] each.

    Args:
        harmful: bool [rows].
        questions: One a row; rows that share one stay in one fold.

    Raises:
        ConfigError: There are too few questions, or too few answers of one label.
    """
    numbers: dict[Hashable, int] = {}
    groups = [numbers.setdefault(question, len(numbers)) for question in questions]
    if len(numbers) < FOLDS:
        raise ConfigError(
            f"the labelled answers belong to {len(numbers)} questions; the temperature is checked on {FOLDS} folds of "
            "questions. Give more labelled answers, or leave --labelled out."
        )
    folds = list(GroupKFold(FOLDS).split(groups, groups=groups))
    if any(harmful[others].all() or not harmful[others].any() for others, _ in folds):
        raise ConfigError(
            f"the labelled answers hold {int(harmful.sum())} harmful and {int((~harmful).sum())} harmless ones; the "
            "temperature needs several of both, of several questions. Give more of what is missing."
        )
    return folds


def cross_fit(log_odds: Floats, harmful: Bools, questions: Sequence[Hashable]) -> Floats:
    """The temperature for each row that was fitted on the other folds, float [rows].

    Args:
        log_odds: float [rows].
        harmful: bool [rows].
        questions: As in `question_folds`.

    Raises:
        ConfigError: There are too few answers, or no temperature fits best.
    """
    temperatures = np.empty(harmful.size)
    for others, fold in question_folds(harmful, questions):
        temperature = fit_temperature(log_odds[others], harmful[others])
        require_inner_temperature(temperature)
        temperatures[fold] = temperature
    return temperatures
