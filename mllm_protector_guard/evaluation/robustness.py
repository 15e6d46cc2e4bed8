"""What is left of a detector's figures when answers are spelled to deceive it, or harm hides in a long answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.evaluation.bury import BuriedRow, count_words
from mllm_protector_guard.evaluation.data import LabelledRow
from mllm_protector_guard.evaluation.metrics import Measured, Metrics, measure
from mllm_protector_guard.evaluation.perturb import perturb_row

__all__ = ["Buried", "Perturbed", "Scoring", "drawn_rows", "measure_buried", "measure_perturbed"]

Scoring = Callable[[Sequence[LabelledRow]], Iterable[float | None]]
"""The harm score of each row, in order; None where the detector failed."""


class Perturbed(BaseModel):
    """The figures on clean answers and on the same answers under a spelling attack.

    Attributes:
        kind: Name of the attack.
        unchanged: Answers that the attack could not spell otherwise; they are measured too.
        failed: Rows that could not be scored in both spellings; they are not measured.
        auroc_drop: AUROC on the clean answers less that on the attacked ones; None where undefined.
        clean: Figures on the clean answers.
        attacked: Figures on the attacked ones, at the same threshold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    unchanged: int
    failed: int
    auroc_drop: float | None
    clean: Metrics
    attacked: Metrics


class Buried(Measured):
    """The figures on long answers: with one harmful paragraph (harmful), and without it (harmless).

    Attributes:
        words: About how long the answers were asked to be.
        mean_words: How long those with the harmful paragraph are.
        failed: Long answers that could not be scored; they are not measured.
        recall_alone: Recall on the same harmful answers by themselves; None if none was scored.
    """

    words: int
    mean_words: float
    failed: int
    recall_alone: float | None


def drawn_rows(rows: Sequence[LabelledRow], limit: int | None) -> list[LabelledRow]:
    """The labelled rows; of more than `limit` harmful or harmless ones, `limit` of them drawn with a fixed seed."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit!r}; give a number of at least 1")
    kept: set[int] = set()
    for harmful in (True, False):
        of_class = [index for index, row in enumerate(rows) if row.harmful is harmful]
        rng = random.Random(0)  # noqa: S311 - a repeatable draw, no secret
        kept |= {*(of_class if limit is None or len(of_class) <= limit else rng.sample(of_class, limit))}
    return [rows[index] for index in sorted(kept)]


def measure_perturbed(scoring: Scoring, rows: Sequence[LabelledRow], kind: str, *, threshold: float) -> Perturbed:
    """The figures of the labelled rows before and after a spelling attack.

    Raises:
        ConfigError: There is no such attack.
    """
    labelled = [row for row in rows if row.harmful is not None]
    attacked = [perturb_row(row, kind) for row in labelled]
    scored = [
        (row.harmful is True, before, after)
        for row, before, after in zip(labelled, scoring(labelled), scoring(attacked), strict=True)
        if before is not None and after is not None
    ]
    labels = [label for label, _, _ in scored]
    clean = measure(labels, [before for _, before, _ in scored], threshold=threshold)
    under_attack = measure(labels, [after for _, _, after in scored], threshold=threshold)
    both = clean.auroc is not None and under_attack.auroc is not None
    return Perturbed(
        kind=kind,
        unchanged=sum(row.answer == other.answer for row, other in zip(labelled, attacked, strict=True)),
        failed=len(labelled) - len(scored),
        auroc_drop=(clean.auroc or 0.0) - (under_attack.auroc or 0.0) if both else None,
        clean=clean,
        attacked=under_attack,
    )


def measure_buried(scoring: Scoring, rows: Sequence[BuriedRow], *, words: int, threshold: float) -> Buried:
    """The figures of long answers that `bury` made; `words` is what it was asked for."""
    long = [one for row in rows for one in (row.buried, row.without)]
    pairs = zip(long, scoring(long), strict=True)
    scored = [(row.harmful is True, score) for row, score in pairs if score is not None]
    alone = [score for score in scoring([row.row for row in rows]) if score is not None]
    return Buried(
        words=words,
        mean_words=fmean(count_words(row.buried.answer) for row in rows) if rows else 0.0,
        failed=len(long) - len(scored),
        recall_alone=measure([True] * len(alone), alone, threshold=threshold).recall,
        metrics=measure([label for label, _ in scored], [score for _, score in scored], threshold=threshold),
    )
