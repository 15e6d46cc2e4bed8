"""Calibrates a detector on scores of a user's own answers: what `mllm-protector calibrate` computes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mllm_protector_guard.training.calibrate import (
    Bools,
    Floats,
    FprBound,
    as_threshold,
    best_f1_cut,
    fit_temperature,
    guaranteed_cut,
    require_inner_temperature,
    to_log_odds,
    to_scores,
)
from mllm_protector_guard.training.reliability import Reliability, cross_fit, measure_reliability

__all__ = ["Fit", "LabelledScores", "Prefer", "Recalibration", "ReliabilityChange", "detection_rates", "recalibrate"]

Prefer = Literal["guarantee", "f1"]

_SHORT, _LONG = 50, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledScores:
    """Labelled answers, as a detector scored them.

    Attributes:
        scores: P(harmful), float [rows].
        harmful: bool [rows].
        questions: What tells the question of each row; rows that share one are never in two folds.
        words: Length of each answer, int [rows].
    """

    scores: Floats
    harmful: Bools
    questions: tuple[Hashable, ...]
    words: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityChange:
    """The same answers before and after, each after-score with a temperature that was fitted on other questions.

    Attributes:
        words: Which answers: `all`, or the range of their length in words.
        before: With the present temperature.
        after: With a new one.
    """

    words: str
    before: Reliability
    after: Reliability


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A temperature and how it did on rows that it was not fitted on.

    Attributes:
        temperature: By which the log odds of the present scores are divided; multiplies the present temperature.
        lowest: Least temperature of the five folds.
        highest: Greatest temperature of the five folds.
        reliability: Of all answers, then of each length that there is.
    """

    temperature: float
    lowest: float
    highest: float
    reliability: tuple[ReliabilityChange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalibration:
    """A new temperature and threshold.

    Attributes:
        fit: None without labelled answers.
        factor: By which log odds of present scores are divided before the threshold is applied; 1 where a new
            temperature cannot be carried over.
        threshold: On the scores so made, in (0, 1).
        safe_flagged: Safe answers at or above it, with those that could not be scored.
    """

    fit: Fit | None
    factor: float
    threshold: float
    safe_flagged: int

    def rescored(self, scores: Floats) -> Floats:
        """What the detector gives with the new temperature for present `scores`, float [rows] in [0, 1]."""
        return to_scores(to_log_odds(scores) / self.factor)


def recalibrate(
    safe_scores: Floats,
    labelled: LabelledScores | None,
    bound: FprBound,
    *,
    prefer: Prefer = "guarantee",
    rescale: bool = True,
) -> Recalibration:
    """The temperature with the best likelihood on the labelled answers, and a threshold for which the bound holds.

    Args:
        safe_scores: Present P(harmful) of safe answers, float [safe rows]; inf where scoring failed.
        labelled: None keeps the temperature.
        bound: What is to hold for the false positive rate.
        prefer: `guarantee` takes the lowest threshold of the bound; `f1` the one from there upwards with the best F1
            on the labelled answers.
        rescale: Whether the detector can take over a temperature.

    Raises:
        ConfigError: There are too few answers, or their scores allow no temperature or threshold.
    """
    cut = guaranteed_cut(safe_scores, bound)
    fit = None if labelled is None else _fit(labelled)
    factor = fit.temperature if fit is not None and rescale else 1.0
    if prefer == "f1" and labelled is not None:
        cut = best_f1_cut(to_log_odds(labelled.scores), labelled.harmful, cut, factor)
    threshold = as_threshold(cut, factor)
    passing = np.isfinite(safe_scores) & (to_scores(to_log_odds(safe_scores) / factor) < threshold)
    return Recalibration(fit=fit, factor=factor, threshold=threshold, safe_flagged=int((~passing).sum()))


def detection_rates(flagged: Bools, harmful: Bools) -> dict[str, float | None]:
    """`recall`, `precision`, `f1` and `fpr`, each in [0, 1] or None where the answers do not define it.

    Args:
        flagged: bool [rows].
        harmful: bool [rows].
    """
    found, called, positives = int((flagged & harmful).sum()), int(flagged.sum()), int(harmful.sum())
    negatives = harmful.size - positives
    return {
        "recall": found / positives if positives else None,
        "precision": found / called if called else None,
        "f1": 2.0 * found / (called + positives) if positives else None,
        "fpr": (called - found) / negatives if negatives else None,
    }


def _fit(labelled: LabelledScores) -> Fit:
    log_odds, harmful = to_log_odds(labelled.scores), labelled.harmful
    by_row = cross_fit(log_odds, harmful, labelled.questions)
    temperature = fit_temperature(log_odds, harmful)
    require_inner_temperature(temperature)
    lengths = {
        "all": np.full(harmful.size, True),
        f"< {_SHORT}": labelled.words < _SHORT,
        f"{_SHORT}–{_LONG}": (labelled.words >= _SHORT) & (labelled.words <= _LONG),
        f"> {_LONG}": labelled.words > _LONG,
    }
    return Fit(
        temperature=temperature,
        lowest=float(by_row.min()),
        highest=float(by_row.max()),
        reliability=tuple(
            ReliabilityChange(
                words=words,
                before=measure_reliability(log_odds[rows], harmful[rows]),
                after=measure_reliability(log_odds[rows] / by_row[rows], harmful[rows]),
            )
            for words, rows in lengths.items()
            if rows.any()
        ),
    )
