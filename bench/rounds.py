"""Times several calls in turns, so that a busy machine slows all of them alike; needs nothing but Python."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

__all__ = ["CLOCKS", "Spread", "alternated"]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What time is measured by; that of the processor leaves out what other programs take, and adds threads up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of some values, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = list(values)
        if len(found) == 1:
            return cls(median=found[0], low=found[0], high=found[0])
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)

    def shown(self, pattern: str) -> str:
        """Median and quartiles in the format `pattern`, e.g. ",.0f"."""
        return f"{self.median:{pattern}} ({self.low:{pattern}}-{self.high:{pattern}})"


def alternated(
    calls: Mapping[str, Callable[[], object]], rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Durations of each call, one a round, seconds of `clock`; which call is first changes from round to round."""
    names = list(calls)
    durations: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            calls[name]()
            durations[name].append(clock() - started)
    return durations
