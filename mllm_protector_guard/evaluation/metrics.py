"""How well scores tell harmful answers from harmless ones. Harmful is the positive class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mllm_protector_guard.errors import MissingDependencyError

try:
    import numpy as np
    from sklearn.metrics import confusion_matrix, roc_auc_score
except ImportError as error:
    raise MissingDependencyError("scikit-learn", "train") from error

__all__ = ["Interval", "Metrics", "measure"]

_Z95 = 1.959964
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A 95 % confidence interval; both ends in [0, 1]."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Counts and rates at one threshold. A rate is None where the rows do not define it.

    Attributes:
        true_positives: Harmful answers that were called harmful.
        false_positives: Harmless answers that were called harmful.
        false_negatives: Harmful answers that were let through.
        true_negatives: Harmless answers that were let through.
        precision: Share of the answers called harmful that are; needs both classes and one call.
        recall: Share of the harmful answers that were called so; needs a harmful answer.
        f1: Harmonic mean of the two, 0 when nothing harmful was found; needs both classes.
        auroc: Chance that a harmful answer scores above a harmless one; needs both classes.
        fpr: Share of the harmless answers that were called harmful; needs a harmless answer.
        intervals: 95 % interval by name of the rate; Wilson's for precision, recall and fpr, Hanley and
            McNeil's (1982) for auroc, a bootstrap with a fixed seed for f1.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    precision: float | None
    recall: float | None
    f1: float | None
    auroc: float | None
    fpr: float | None
    intervals: dict[str, Interval]

    @property
    def measured(self) -> int:
        """Answers that have a label and a score."""
        return self.harmful + self.harmless

    @property
    def harmful(self) -> int:
        """Harmful answers."""
        return self.true_positives + self.false_negatives

    @property
    def harmless(self) -> int:
        """Harmless answers."""
        return self.false_positives + self.true_negatives


def measure(labels: Sequence[bool], harm_scores: Sequence[float], *, threshold: float) -> Metrics:
    """The metrics of scores in [0, 1] against labels (True = harmful), same order; no rows give empty rates."""
    called = [score >= threshold for score in harm_scores]
    tn, fp, fn, tp = (
        (int(n) for n in confusion_matrix(labels, called, labels=[False, True]).ravel()) if labels else (0, 0, 0, 0)
    )
    positives, negatives = tp + fn, fp + tn
    both = positives > 0 and negatives > 0
    auroc = float(roc_auc_score(labels, harm_scores)) if both else None
    intervals = {
        "precision": _wilson(tp, tp + fp) if both else None,
        "recall": _wilson(tp, positives),
        "f1": _bootstrap_f1(tp, fp, fn, tn) if both else None,
        "auroc": None if auroc is None else _hanley_mcneil(auroc, positives, negatives),
        "fpr": _wilson(fp, negatives),
    }
    return Metrics(
        true_positives=tp,
        false_positives=fp,
        false_negatives=fn,
        true_negatives=tn,
        precision=_share(tp, tp + fp) if both else None,
        recall=_share(tp, positives),
        f1=_share(2 * tp, 2 * tp + fp + fn) if both else None,
        auroc=auroc,
        fpr=_share(fp, negatives),
        intervals={name: interval for name, interval in intervals.items() if interval is not None},
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _wilson(part: int, whole: int) -> Interval | None:
    if not whole:
        return None
    share, z2 = part / whole, _Z95**2
    center = (share + z2 / (2 * whole)) / (1 + z2 / whole)
    half = _Z95 * math.sqrt(share * (1 - share) / whole + z2 / (4 * whole**2)) / (1 + z2 / whole)
    return _clipped(center - half, center + half)


def _hanley_mcneil(auroc: float, positives: int, negatives: int) -> Interval:
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = (auroc * (1 - auroc) + (positives - 1) * (q1 - auroc**2) + (negatives - 1) * (q2 - auroc**2)) / (
        positives * negatives
    )
    half = _Z95 * math.sqrt(max(variance, 0.0))
    return _clipped(auroc - half, auroc + half)


def _bootstrap_f1(tp: int, fp: int, fn: int, tn: int) -> Interval:
    # F1 depends on the four counts only, and the counts of resampled rows are multinomial.
    rows = tp + fp + fn + tn
    counts = np.random.default_rng(0).multinomial(rows, np.array([tp, fp, fn, tn]) / rows, size=_RESAMPLES)
    found, wrong = 2 * counts[:, 0], counts[:, 1] + counts[:, 2]
    f1 = np.divide(found, found + wrong, out=np.zeros(_RESAMPLES), where=found + wrong > 0)
    low, high = np.quantile(f1, [0.025, 0.975])
    return _clipped(float(low), float(high))


def _clipped(low: float, high: float) -> Interval:
    return Interval(low=max(low, 0.0), high=min(high, 1.0))
