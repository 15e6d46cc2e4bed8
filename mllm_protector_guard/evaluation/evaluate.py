"""Measures any harm detector on labelled answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.evaluation.data import LabelledRow
from mllm_protector_guard.evaluation.metrics import Metrics, measure
from mllm_protector_guard.guard import Guard
from mllm_protector_guard.policy import GuardPolicy
from mllm_protector_guard.ports import HarmDetector
from mllm_protector_guard.types import GuardResult, Turn

__all__ = ["RATES", "Evaluation", "ScoredLabel", "evaluate", "macro_mean", "score_turns", "scoring_guard", "summarise"]

RATES = ("precision", "recall", "f1", "auroc", "fpr")
"""The rates of `Metrics`, in the order reports show them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredLabel:
    """A label and the score that was given without seeing it.

    Attributes:
        harmful: The label; None when nobody knows.
        harm_score: P(harmful), [0, 1]; None if the detector failed on the answer, or was not asked because
            there is no label.
    """

    harmful: bool | None
    harm_score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a detector did on one set of rows.

    Attributes:
        name: Of the set.
        threshold: Scores at or above it count as harmful.
        rows: All rows, of which `unlabelled` and `failed` are not measured.
        unlabelled: Rows whose label is unknown.
        failed: Labelled rows that the detector could not score.
        malformed: Lines that held no usable row; not counted in `rows`.
        metrics: Over the remaining rows.
    """

    name: str
    threshold: float
    rows: int
    unlabelled: int
    failed: int
    malformed: int = 0
    metrics: Metrics


def evaluate(
    detector: HarmDetector,
    rows: Iterable[LabelledRow],
    *,
    threshold: float | None = None,
    batch_size: int = 32,
    name: str = "",
) -> Evaluation:
    """The detector's figures on the rows.

    A blank answer is judged as the guard judges it: harmless, score 0, without asking the detector.

    Args:
        detector: Any object with `score(turns)`.
        rows: Labelled or not; rows without a label are counted and not scored.
        threshold: Scores at or above it count as harmful; None takes the detector's own, else 0.5.
        batch_size: Rows a call of the detector.
        name: Of the set, for reports.

    Raises:
        ConfigError: The threshold or the batch size is out of range.
        CheckpointError: The model cannot be loaded.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; give a number of at least 1")
    guard = scoring_guard(detector, threshold=threshold)
    scored: list[ScoredLabel] = []
    unread = iter(rows)
    while batch := list(islice(unread, batch_size)):
        scores = iter(score_turns(guard, [row.turn for row in batch if row.harmful is not None]))
        scored += [
            ScoredLabel(harmful=row.harmful, harm_score=None if row.harmful is None else next(scores)) for row in batch
        ]
    return summarise(scored, threshold=guard.threshold, name=name)


def scoring_guard(detector: HarmDetector, *, threshold: float | None = None) -> Guard:
    """A guard that only scores: no answer is changed, and a failure is told and not decided on.

    Raises:
        ConfigError: The threshold is no number in [0, 1], or the detector has no `score` method.
    """
    try:
        policy = GuardPolicy(threshold=threshold, on_harm="flag", on_error="raise")
    except ValueError:
        raise ConfigError(f"threshold is {threshold!r}; give a number in [0, 1]") from None
    return Guard(detector=detector, policy=policy)


def score_turns(guard: Guard, turns: Sequence[Turn]) -> list[float | None]:
    """The checked score of each turn, 0 for a blank answer, None where the detector failed."""
    results = guard.check_batch(turns, return_exceptions=True)
    return [_score_of(result) if isinstance(result, GuardResult) else None for result in results]


def _score_of(result: GuardResult) -> float:
    return 0.0 if result.harm_score is None else result.harm_score


def summarise(scored: Sequence[ScoredLabel], *, threshold: float, name: str = "", malformed: int = 0) -> Evaluation:
    """The evaluation of scores that are already there."""
    labelled = [one for one in scored if one.harmful is not None]
    measured = [(one.harmful is True, one.harm_score) for one in labelled if one.harm_score is not None]
    return Evaluation(
        name=name,
        threshold=threshold,
        rows=len(scored),
        unlabelled=len(scored) - len(labelled),
        failed=len(labelled) - len(measured),
        malformed=malformed,
        metrics=measure([harmful for harmful, _ in measured], [score for _, score in measured], threshold=threshold),
    )


def macro_mean(evaluations: Sequence[Evaluation]) -> dict[str, float | None]:
    """The mean of each rate over the sets that define it, each set counted once; None where none does."""
    means: dict[str, float | None] = {}
    for rate in RATES:
        values = [value for one in evaluations if (value := getattr(one.metrics, rate)) is not None]
        means[rate] = fmean(values) if values else None
    return means
