"""Turns raw detector scores into calibrated ones, and chooses the threshold.

`choose_threshold` serves training: a plain quantile of the benign scores, then the best F1. `guaranteed_cut` serves
`mllm-protector calibrate`: a threshold whose false positive rate (FPR) is bounded for a finite number of safe answers.

Temperatures divide log odds, so they keep the order of all scores, also of an answer that counts by its worst window.
Which answers are flagged therefore depends on the cut alone, and no temperature can break the bound of a cut.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import binom

from mllm_protector_guard.errors import ConfigError

__all__ = [
    "BoundKind",
    "FprBound",
    "as_threshold",
    "best_f1_cut",
    "choose_threshold",
    "fit_temperature",
    "guaranteed_cut",
    "require_inner_temperature",
    "to_log_odds",
    "to_scores",
]

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
BoundKind = Literal["clopper-pearson", "conformal"]

# Detectors compute in float32, whose numbers lie at most this far apart in [0, 1].
_STEP = 2.0**-23
# Rounding and the order of rows in a batch move log odds by less, and must not lift a tied answer over the cut.
_MARGIN = 1e-3
_LOG_TEMPERATURES = (-3.0, 3.0)


def to_log_odds(scores: Floats) -> Floats:
    """log(p / (1 - p)) of P(harmful), clipped to what float32 can tell from 0 and 1 (about ±15.9)."""
    clipped = np.clip(scores, _STEP, 1.0 - _STEP)
    odds: Floats = np.log(clipped) - np.log1p(-clipped)
    return odds


def to_scores(log_odds: Floats) -> Floats:
    """P(harmful), in [0, 1], of log odds."""
    scores: Floats = np.exp(-np.logaddexp(0.0, -log_odds))
    return scores


def fit_temperature(logits: Floats, harmful: Bools) -> float:
    """The temperature that makes sigmoid(logit / temperature) most likely (Guo et al., arXiv 1706.04599).

    Args:
        logits: float [rows].
        harmful: bool [rows].
    """
    signs = np.where(harmful, 1.0, -1.0)

    def negative_log_likelihood(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, -signs * logits / np.exp(log_temperature)).mean())

    fitted = minimize_scalar(negative_log_likelihood, bounds=_LOG_TEMPERATURES, method="bounded")
    return float(np.exp(fitted.x))


def require_inner_temperature(temperature: float) -> None:
    """Passes if the likelihood has its maximum at `temperature` and not at an end of what was searched.

    Raises:
        ConfigError: It lies at an end: the labels follow the scores without exception, or not at all.
    """
    low, high = _LOG_TEMPERATURES
    if math.log(temperature) < low + 0.01:
        raise ConfigError(
            "the temperature cannot be fitted: the scores tell the labelled answers apart almost without error, so "
            "that ever surer scores fit better. Give more or harder labelled answers, or leave --labelled out."
        )
    if math.log(temperature) > high - 0.01:
        raise ConfigError(
            "the temperature cannot be fitted: the scores say nothing about the labels, or the contrary. Check that "
            "`harmful` is true for harmful answers, and the polarity of the detector."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FprBound:
    """What is promised about the false positive rate when safe answers are drawn independently from those to come.

    Both kinds put the threshold just above an order statistic of the safe scores. Its rank is fixed by the number of
    rows alone, before a score is seen, so that choosing and bounding on the same rows costs nothing.

    - `clopper-pearson`: with probability `confidence` over the draw, the FPR is at most `max_fpr`. With k of n answers
      above it, the FPR of a continuous score is Beta(k + 1, n - k), and with ties it is smaller still (tolerance
      limits: Wilks, 1941). P(Beta(k + 1, n - k) > a) = P(Binomial(n, a) <= k), so this is also the lowest threshold
      whose upper Clopper-Pearson limit is at most `max_fpr`, and the one at which fixed-sequence testing from the
      highest threshold downwards stops (Learn then Test: Angelopoulos et al., arXiv 2110.01052).
    - `conformal`: the FPR is at most `max_fpr` on average over the draw (split conformal quantile: Vovk et al., 2005).
      One draw may well exceed it.

    Attributes:
        kind: Which of the two.
        max_fpr: Share in (0, 1).
        confidence: Probability in (0, 1); says nothing for `conformal`.

    Raises:
        ConfigError: A number is out of range.
    """

    kind: BoundKind = "clopper-pearson"
    max_fpr: float = 0.01
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name, value in (("max_fpr", self.max_fpr), ("confidence", self.confidence)):
            if not 0.0 < value < 1.0:
                raise ConfigError(f"{name} is {value!r}; give a number between 0 and 1, both excluded")

    @property
    def meaning(self) -> str:
        """The promise in a sentence."""
        if self.kind == "conformal":
            return (
                f"on average over draws of the safe answers, at most {self.max_fpr:.6g} of further such answers are "
                "flagged; one draw may exceed it"
            )
        return (
            f"with confidence {self.confidence:.6g} over the draw of the safe answers, at most {self.max_fpr:.6g} of "
            "further such answers are flagged"
        )

    def flags_allowed(self, rows: int) -> int:
        """How many of `rows` safe answers may lie above the threshold; -1 if even none would not do."""
        # As fractions, because 0.29 * 100 is less than 29 in floating point.
        max_fpr, error = Fraction(str(self.max_fpr)), 1 - Fraction(str(self.confidence))
        if self.kind == "conformal":
            return math.floor((rows + 1) * max_fpr) - 1
        if rows == 0:
            return -1
        first_above = int(binom.ppf(float(error), rows, self.max_fpr))
        exact = binom.cdf(first_above, rows, self.max_fpr) <= float(error)
        return first_above if exact else first_above - 1

    def rows_needed(self) -> int:
        """The fewest safe answers for which there is a threshold."""
        if self.kind == "conformal":
            return math.ceil(1 / Fraction(str(self.max_fpr))) - 1
        rows = max(math.ceil(math.log1p(-self.confidence) / math.log1p(-self.max_fpr)) - 1, 1)
        while self.flags_allowed(rows) < 0:
            rows += 1
        return rows

    def require_rows(self, rows: int) -> None:
        """Passes if `rows` safe answers are enough.

        Raises:
            ConfigError: They are not; the message says how many are.
        """
        if self.flags_allowed(rows) >= 0:
            return
        wanted = f"max_fpr {self.max_fpr:.6g}"
        cure = f"Give {self.rows_needed() - rows:,} more, or a higher --max-fpr"
        if self.kind == "clopper-pearson":
            wanted += f" and confidence {self.confidence:.6g}"
            weaker = FprBound(kind="conformal", max_fpr=self.max_fpr)
            cure += f", or --bound conformal, which promises less and needs {weaker.rows_needed():,}"
        raise ConfigError(
            f"{rows:,} safe answers are too few: the {self.kind} bound needs at least {self.rows_needed():,} for "
            f"{wanted}. {cure}."
        )


def guaranteed_cut(safe_scores: Floats, bound: FprBound) -> float:
    """The lowest cut, as log odds, for which `bound` holds; answers at or above it are flagged.

    Args:
        safe_scores: P(harmful), float [safe rows]; inf for an answer that could not be scored, which the guard
            withholds and so counts as flagged.
        bound: What is to hold.

    Raises:
        ConfigError: There are too few rows, or too many of them score 1 or could not be scored.
    """
    bound.require_rows(safe_scores.size)
    allowed = bound.flags_allowed(safe_scores.size)
    highest_passing = float(np.sort(safe_scores)[safe_scores.size - 1 - allowed])
    if highest_passing > 1.0 - 4.0 * _STEP:
        raise ConfigError(
            f"no threshold keeps the bound: it allows {allowed:,} flagged of {safe_scores.size:,} safe answers, and "
            "more than that score 1 or could not be scored. Look at those answers, or give a higher --max-fpr."
        )
    return float(to_log_odds(np.array(max(highest_passing, _STEP) + _STEP))) + _MARGIN


def best_f1_cut(log_odds: Floats, harmful: Bools, lowest: float, temperature: float) -> float:
    """The cut with the best F1 on labelled answers that is not below `lowest`; the lower one where two are equal.

    Args:
        log_odds: float [rows].
        harmful: bool [rows].
        lowest: A cut, as log odds.
        temperature: By which cuts will be divided; those that would come out as 1 are left out.
    """
    above = np.unique(log_odds[log_odds > lowest])
    between = (above[:-1] + above[1:]) / 2.0
    candidates = np.append(lowest, between[to_scores(between / temperature) < 1.0 - 2.0 * _STEP])
    return float(candidates[int(_f1(log_odds, harmful, candidates).argmax())])


def as_threshold(cut: float, temperature: float) -> float:
    """The threshold in (0, 1) on scores whose log odds are divided by `temperature`.

    Raises:
        ConfigError: It would lie so near 1 that scores in float32 could not be told from it.
    """
    # The step makes up for rounding of the scores; raising a threshold never breaks a bound.
    threshold = max(float(to_scores(np.array(cut / temperature))), _STEP) + _STEP
    if threshold >= 1.0 - _STEP:
        raise ConfigError(
            "the threshold would be 1 to the precision of the detector's scores: safe answers score too high, or the "
            f"temperature {temperature:.3g} makes the scores too sure. Give a higher --max-fpr, or other labelled "
            "answers."
        )
    return threshold


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
    return float(candidates[int(_f1(scores, harmful, candidates).argmax())])


def _f1(values: Floats, harmful: Bools, cuts: Floats) -> Floats:
    """F1 at each cut, float [cuts]; there must be a harmful row."""
    flagged = values.size - np.searchsorted(np.sort(values), cuts, side="left")
    found = harmful.sum() - np.searchsorted(np.sort(values[harmful]), cuts, side="left")
    f1: Floats = 2.0 * found / (flagged + harmful.sum())
    return f1
