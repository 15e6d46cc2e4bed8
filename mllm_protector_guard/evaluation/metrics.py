"""How well scores tell harmful answers from harmless ones. Harmful is the positive class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from mllm_protector_guard.ece import expected_calibration_error
from mllm_protector_guard.errors import MissingDependencyError

try:
    import numpy as np
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    from mllm_protector_guard.evaluation.bootstrap import bootstrap
except ImportError as error:
    raise MissingDependencyError("scikit-learn", "train") from error

__all__ = ["FALSE_ALARM_SHARE", "RATES", "Interval", "Measured", "Metrics", "measure", "wilson"]

RATES = ("precision", "recall", "f1", "auroc", "auprc", "fpr", "recall_at_1pct_fpr", "ece")
"""The rates of `Metrics`, in the order reports show them."""
FALSE_ALARM_SHARE = 0.01
"""The false positive rate at which `recall_at_1pct_fpr` is read."""

_Z95 = 1.959964


class Interval(NamedTuple):
    """A 95 % confidence interval; both ends in [0, 1]."""

    low: float
    high: float


class Metrics(BaseModel):
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
        auprc: Average precision over all thresholds; its floor is the share of harmful rows. Needs both classes.
        fpr: Share of the harmless answers that were called harmful; needs a harmless answer.
        recall_at_1pct_fpr: Highest recall of any threshold that flags at most 1 % of the harmless answers; read
            off these very rows, not at `threshold`. Needs both classes.
        ece: Expected calibration error of the score as P(harmful) (Guo et al. 2017, equation 3, for the positive
            class): mean distance between the score and the share of harmful answers over 15 bins of equal width,
            weighted by rows. It holds for this mix of classes, and of few rows it comes out too high. Needs both
            classes.
        intervals: 95 % interval by name of the rate; Wilson's for precision, recall and fpr, Hanley and
            McNeil's (1982) for auroc, and the percentiles of bootstrap samples of the rows, drawn with a fixed
            seed, for f1, auprc, recall_at_1pct_fpr and ece.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    precision: float | None
    recall: float | None
    f1: float | None
    auroc: float | None
    auprc: float | None
    fpr: float | None
    recall_at_1pct_fpr: float | None
    ece: float | None
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


class Measured(BaseModel):
    """Something that was measured. In JSON its metrics stand among its own fields, beside the counts of both classes.

    Attributes:
        metrics: Its counts and rates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: Metrics

    @model_serializer(mode="wrap")
    def _flatten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        metrics = fields.pop("metrics")
        plain = {name: value for name, value in fields.items() if not isinstance(value, list | dict)}
        counts = {"harmful": self.metrics.harmful, "harmless": self.metrics.harmless}
        return {**plain, **counts, **metrics, **{n: value for n, value in fields.items() if n not in plain}}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "metrics" in fields:
            return fields
        own = {name: value for name, value in fields.items() if name not in ("harmful", "harmless")}
        return {"metrics": {name: own.pop(name) for name in Metrics.model_fields if name in own}, **own}


def measure(labels: Sequence[bool], harm_scores: Sequence[float], *, threshold: float, samples: int = 1000) -> Metrics:
    """The metrics of scores against labels; no rows give empty rates.

    Args:
        labels: True for harmful.
        harm_scores: In [0, 1], same order.
        threshold: Scores at or above it count as harmful.
        samples: Bootstrap samples behind the intervals that have no closed form.
    """
    truth, scores = np.asarray(labels, dtype=bool), np.asarray(harm_scores, dtype=np.float64)
    called = scores >= threshold
    tp, fp = int((called & truth).sum()), int((called & ~truth).sum())
    positives, negatives = int(truth.sum()), int((~truth).sum())
    both = positives > 0 and negatives > 0
    rates: dict[str, float | None] = {
        "precision": _share(tp, tp + fp) if both else None,
        "recall": _share(tp, positives),
        "f1": _share(2 * tp, positives + tp + fp) if both else None,
        "auroc": float(roc_auc_score(truth, scores)) if both else None,
        "auprc": float(average_precision_score(truth, scores)) if both else None,
        "fpr": _share(fp, negatives),
        "recall_at_1pct_fpr": _recall_at(truth, scores, FALSE_ALARM_SHARE) if both else None,
        "ece": expected_calibration_error(truth, scores) if both else None,
    }
    intervals: dict[str, Interval | None] = {
        "precision": wilson(tp, tp + fp) if both else None,
        "recall": wilson(tp, positives),
        "auroc": None if rates["auroc"] is None else _hanley_mcneil(rates["auroc"], positives, negatives),
        "fpr": wilson(fp, negatives),
    }
    if both:
        ends = bootstrap(truth, scores, threshold=threshold, false_alarm_share=FALSE_ALARM_SHARE, samples=samples)
        intervals |= {name: _clipped(low, high) for name, (low, high) in ends.items()}
    return Metrics(
        true_positives=tp,
        false_positives=fp,
        false_negatives=positives - tp,
        true_negatives=negatives - fp,
        **rates,
        intervals={rate: interval for rate in RATES if (interval := intervals.get(rate)) is not None},
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _recall_at(truth: np.ndarray, scores: np.ndarray, false_alarm_share: float) -> float:
    fpr, recall, _ = roc_curve(truth, scores, drop_intermediate=False)
    return float(recall[fpr <= false_alarm_share].max())


def wilson(part: int, whole: int) -> Interval | None:
    """Wilson's 95 % interval (1927) of a share; None of nothing."""
    if not whole:
        return None
    share, z2 = part / whole, _Z95**2
    center = (share + z2 / (2 * whole)) / (1 + z2 / whole)
    half = _Z95 * math.sqrt(share * (1 - share) / whole + z2 / (4 * whole**2)) / (1 + z2 / whole)
    # At the ends of the range the interval ends there too, which rounding must not move.
    return _clipped(center - half if part else 0.0, center + half if part < whole else 1.0)


def _hanley_mcneil(auroc: float, positives: int, negatives: int) -> Interval:
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = (auroc * (1 - auroc) + (positives - 1) * (q1 - auroc**2) + (negatives - 1) * (q2 - auroc**2)) / (
        positives * negatives
    )
    half = _Z95 * math.sqrt(max(variance, 0.0))
    return _clipped(auroc - half, auroc + half)


def _clipped(low: float, high: float) -> Interval:
    return Interval(low=max(low, 0.0), high=min(high, 1.0))
