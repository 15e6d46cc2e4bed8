"""How long scoring takes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from mllm_protector_guard.evaluation.data import LabelledRow

__all__ = ["Latency", "Stopwatch"]


class Latency(BaseModel):
    """Times of scoring, without the loading of the model and without scores kept from an earlier run.

    Attributes:
        device: What the model ran on.
        batch_size: Most answers of a batch.
        answers: Answers that were scored in batches and timed.
        batched_p50_ms: Milliseconds an answer, median over answers; an answer's time is that of its batch divided
            by the answers of the batch.
        batched_p95_ms: 95th percentile of the same.
        answers_per_s: Answers divided by the seconds of all batches.
        single_answers: Answers, drawn with a fixed seed, that were scored once more, one call each.
        single_p50_ms: Milliseconds of such a call, median; None without a sample.
        single_p95_ms: 95th percentile of the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    batch_size: int
    answers: int
    batched_p50_ms: float
    batched_p95_ms: float
    answers_per_s: float
    single_answers: int
    single_p50_ms: float | None
    single_p95_ms: float | None


class Stopwatch:
    """Collects the times of batches, and a random sample of the rows in them.

    Args:
        sample: How many rows `single_ms` will score one by one.
    """

    def __init__(self, *, sample: int = 50) -> None:
        self._batches: list[tuple[int, float]] = []
        self._answers = 0
        self._size = sample
        self._sample: list[LabelledRow] = []
        self._rng = random.Random(0)  # noqa: S311 - a repeatable draw, no secret

    def add(self, rows: Sequence[LabelledRow], seconds: float) -> None:
        """Takes note of a batch of rows that took so long."""
        if not rows:
            return
        self._batches.append((len(rows), seconds))
        for number, row in enumerate(rows, start=self._answers):  # reservoir sampling (Vitter 1985, algorithm R)
            if number < self._size:
                self._sample.append(row)
            elif (place := self._rng.randint(0, number)) < self._size:
                self._sample[place] = row
        self._answers += len(rows)

    def single_ms(self, score: Callable[[LabelledRow], object]) -> list[float]:
        """The milliseconds of each sampled row when it is scored alone; one call before them is not timed."""
        times: list[float] = []
        for row in [*self._sample[:1], *self._sample]:
            start = time.perf_counter()
            score(row)
            times.append(1000 * (time.perf_counter() - start))
        return times[1:]

    def latency(self, *, device: str, batch_size: int, single_ms: Sequence[float] = ()) -> Latency | None:
        """All times together; None if nothing was timed."""
        if not self._batches:
            return None
        counts = np.array([count for count, _ in self._batches])
        seconds = np.array([taken for _, taken in self._batches])
        each = np.repeat(1000 * seconds / counts, counts)
        return Latency(
            device=device,
            batch_size=batch_size,
            answers=int(counts.sum()),
            batched_p50_ms=float(np.quantile(each, 0.5)),
            batched_p95_ms=float(np.quantile(each, 0.95)),
            answers_per_s=float(counts.sum() / max(seconds.sum(), 1e-9)),
            single_answers=len(single_ms),
            single_p50_ms=float(np.quantile(single_ms, 0.5)) if single_ms else None,
            single_p95_ms=float(np.quantile(single_ms, 0.95)) if single_ms else None,
        )
