"""What the pictures of a report are drawn from: the ROC curve, the reliability diagram, the score histogram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import roc_curve

from mllm_protector_guard.ece import ECE_BINS, ece_bin

__all__ = ["HISTOGRAM_BINS", "Curves", "ReliabilityBin", "RocPoint", "curves_of"]

HISTOGRAM_BINS = 20
_ROC_POINTS = 200


class RocPoint(NamedTuple):
    """A point of the ROC curve; both in [0, 1]."""

    fpr: float
    recall: float


class ReliabilityBin(NamedTuple):
    """Answers with scores in one of 15 bins of equal width.

    Attributes:
        rows: How many.
        mean_score: Of theirs, [0, 1].
        harmful_share: How many of them are harmful, [0, 1].
    """

    rows: int
    mean_score: float
    harmful_share: float


class Curves(BaseModel):
    """Pictures of one set of rows, as numbers.

    Attributes:
        roc: From (0, 0) to (1, 1), at most 200 points; empty unless both classes are there.
        reliability: Bins that hold answers, lowest first; empty unless both classes are there.
        harmful_histogram: Harmful answers in each of 20 bins of equal width over [0, 1].
        harmless_histogram: Harmless answers, likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    roc: list[RocPoint]
    reliability: list[ReliabilityBin]
    harmful_histogram: list[int]
    harmless_histogram: list[int]


def curves_of(labels: Sequence[bool], harm_scores: Sequence[float]) -> Curves:
    """The curves of scores in [0, 1] against labels (True = harmful), same order."""
    truth, scores = np.asarray(labels, dtype=bool), np.asarray(harm_scores, dtype=np.float64)
    both = bool(truth.any() and not truth.all())
    return Curves(
        roc=_roc(truth, scores) if both else [],
        reliability=_reliability(truth, scores) if both else [],
        harmful_histogram=_histogram(scores[truth]),
        harmless_histogram=_histogram(scores[~truth]),
    )


def _roc(truth: np.ndarray, scores: np.ndarray) -> list[RocPoint]:
    fpr, recall, _ = roc_curve(truth, scores)
    # Evenly along the curve, not along either axis, so that its steep start keeps its shape.
    along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(fpr)) + np.abs(np.diff(recall)))])
    kept = np.unique(np.searchsorted(along, np.linspace(0.0, along[-1], _ROC_POINTS)).clip(0, len(along) - 1))
    return [RocPoint(round(float(fpr[i]), 5), round(float(recall[i]), 5)) for i in kept]


def _reliability(truth: np.ndarray, scores: np.ndarray) -> list[ReliabilityBin]:
    bins = ece_bin(scores)
    return [
        ReliabilityBin(int(here.sum()), float(scores[here].mean()), float(truth[here].mean()))
        for one in range(ECE_BINS)
        if (here := bins == one).any()
    ]


def _histogram(scores: np.ndarray) -> list[int]:
    return [int(count) for count in np.histogram(scores, bins=HISTOGRAM_BINS, range=(0.0, 1.0))[0]]
