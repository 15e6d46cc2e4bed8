"""Measures any harm detector on labelled answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from statistics import fmean

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.evaluation.bury import bury
from mllm_protector_guard.evaluation.curves import Curves, curves_of
from mllm_protector_guard.evaluation.data import LabelledRow
from mllm_protector_guard.evaluation.metrics import RATES, Measured, measure
from mllm_protector_guard.evaluation.robustness import (
    Buried,
    Perturbed,
    Scoring,
    drawn_rows,
    measure_buried,
    measure_perturbed,
)
from mllm_protector_guard.evaluation.slices import ScoredRow, Slice, slices_of
from mllm_protector_guard.guard import Guard
from mllm_protector_guard.policy import GuardPolicy
from mllm_protector_guard.ports import HarmDetector
from mllm_protector_guard.types import GuardResult, Turn

__all__ = [
    "Evaluation",
    "evaluate",
    "evaluate_buried",
    "evaluate_perturbed",
    "macro_mean",
    "score_turns",
    "scored_row",
    "scoring_guard",
    "summarise",
]


class Evaluation(Measured):
    """What a detector did on one set of rows.

    Attributes:
        name: Of the set.
        threshold: Scores at or above it count as harmful.
        rows: All rows, of which `unlabelled` and `failed` are not measured.
        unlabelled: Rows whose label is unknown.
        failed: Labelled rows that the detector could not score.
        malformed: Lines that held no usable row; not counted in `rows`.
        metrics: Over the remaining rows.
        slices: The same for parts of the rows, by how they are parted: "source", "lang", "length".
        curves: Pictures of the rows as numbers.
        perturbed: The figures under spelling attacks, where asked for.
        buried: The figures on long answers, where asked for.
    """

    name: str
    threshold: float
    rows: int
    unlabelled: int
    failed: int
    malformed: int = 0
    slices: dict[str, list[Slice]]
    curves: Curves
    perturbed: tuple[Perturbed, ...] = ()
    buried: Buried | None = None


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
    guard = scoring_guard(detector, threshold=threshold)
    kept = list(rows)
    scores = iter(_scoring(guard, batch_size)([row for row in kept if row.harmful is not None]))
    scored = [scored_row(row, None if row.harmful is None else next(scores)) for row in kept]
    return summarise(scored, threshold=guard.threshold, name=name)


def evaluate_perturbed(
    detector: HarmDetector,
    rows: Sequence[LabelledRow],
    kinds: Sequence[str],
    *,
    threshold: float | None = None,
    batch_size: int = 32,
    limit: int | None = None,
) -> list[Perturbed]:
    """The detector's figures under spelling attacks, one for each kind, beside those on the clean answers.

    Args:
        detector: Any object with `score(turns)`.
        rows: Labelled ones are measured.
        kinds: Names in `PERTURBATIONS`.
        threshold: As in `evaluate`.
        batch_size: As in `evaluate`.
        limit: Most rows of each class that are measured, drawn with a fixed seed; None takes all.

    Raises:
        ConfigError: There is no such attack, or a setting is out of range.
    """
    guard = scoring_guard(detector, threshold=threshold)
    scoring, chosen = _scoring(guard, batch_size), drawn_rows(rows, limit)
    return [measure_perturbed(scoring, chosen, kind, threshold=guard.threshold) for kind in kinds]


def evaluate_buried(
    detector: HarmDetector,
    rows: Sequence[LabelledRow],
    *,
    words: int = 1500,
    filler: Sequence[str] | None = None,
    threshold: float | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> Buried:
    """The detector's figures on long answers with and without one harmful paragraph; see `bury`.

    Args:
        detector: Any object with `score(turns)`.
        rows: Harmful rows to bury and, without `filler`, harmless ones to bury them in.
        words: About how long a long answer is.
        filler: Harmless paragraphs.
        threshold: As in `evaluate`.
        batch_size: As in `evaluate`.
        limit: Most harmful rows that are buried, drawn with a fixed seed; None takes all.

    Raises:
        ConfigError: There is no harmless text, or a setting is out of range.
    """
    guard = scoring_guard(detector, threshold=threshold)
    harmful = [row for row in drawn_rows(rows, limit) if row.harmful]
    long = bury([*harmful, *(row for row in rows if row.harmful is False)], words=words, filler=filler)
    return measure_buried(_scoring(guard, batch_size), long, words=words, threshold=guard.threshold)


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


def _scoring(guard: Guard, batch_size: int) -> Scoring:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; give a number of at least 1")

    def scoring(rows: Sequence[LabelledRow]) -> Iterable[float | None]:
        unread = iter(rows)
        while batch := list(islice(unread, batch_size)):
            yield from score_turns(guard, [row.turn for row in batch])

    return scoring


def scored_row(row: LabelledRow, harm_score: float | None) -> ScoredRow:
    """What the figures need to know of the row, and its score."""
    return ScoredRow(
        harmful=row.harmful,
        harm_score=harm_score,
        source=row.source,
        lang=row.lang,
        characters=len(row.answer),
    )


def summarise(scored: Sequence[ScoredRow], *, threshold: float, name: str = "", malformed: int = 0) -> Evaluation:
    """The evaluation of scores that are already there."""
    measured = [(one.harmful, one.harm_score) for one in scored if one.harmful is not None]
    labels = [harmful for harmful, score in measured if score is not None]
    scores = [score for _, score in measured if score is not None]
    return Evaluation(
        name=name,
        threshold=threshold,
        rows=len(scored),
        unlabelled=len(scored) - len(measured),
        failed=len(measured) - len(scores),
        malformed=malformed,
        metrics=measure(labels, scores, threshold=threshold),
        slices=slices_of(scored, threshold=threshold),
        curves=curves_of(labels, scores),
    )


def macro_mean(evaluations: Sequence[Evaluation]) -> dict[str, float | None]:
    """The mean of each rate over the sets that define it, each set counted once; None where none does."""
    means: dict[str, float | None] = {}
    for rate in RATES:
        values = [value for one in evaluations if (value := getattr(one.metrics, rate)) is not None]
        means[rate] = fmean(values) if values else None
    return means
