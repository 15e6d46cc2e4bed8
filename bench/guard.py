"""Times the guard with the default model: scoring, batching, and rewriting.

Every figure is the median of several runs after a warm-up, on inputs of ordinary prose; the answers of one row differ
from run to run, so that no cache can help.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from timing import QUESTION

from mllm_protector_guard import Turn, load_detector, load_detoxifier
from mllm_protector_guard.models import DEFAULT_MODEL

PROSE = (
    "Choose a sunny place and look at the soil before you buy anything, because most plants fail for want of drainage. "
    "Water in the morning, mulch against weeds, and give every plant the room it will need when it has grown. "
)
RUDE = "You are too stupid for this, and I hope that somebody breaks your hands, "
LENGTHS = (100, 400, 1_600, 6_400, 25_600)
BATCH = 16


def answers(chars: int) -> itertools.chain[str]:
    """Endlessly many different answers of about `chars` characters."""
    prose = PROSE * (chars // len(PROSE) + 1)
    return itertools.chain.from_iterable([f"Advice {number}. {prose[:chars]}"] for number in itertools.count())


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median duration of `call()`, milliseconds, after one run that is not counted."""
    call()
    durations = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        durations.append((time.perf_counter() - started) * 1000.0)
    return statistics.median(durations)


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    detector = load_detector(options.model, device=options.device)
    detoxifier = load_detoxifier(options.model, device=options.device)

    started = time.perf_counter()
    detector.warm_up()
    detoxifier.warm_up()
    table = Table(title=f"{options.model}, loaded in {time.perf_counter() - started:.1f} s", caption="medians")
    for column in ("what", "ms", "characters/s"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def row(what: str, chars: int, call: Callable[[], object]) -> None:
        ms = median_ms(call, options.repeats)
        table.add_row(what, f"{ms:,.1f}", f"{chars / ms * 1000.0:,.0f}")

    for chars in LENGTHS:
        fresh = answers(chars)
        row(
            f"score one answer of {chars:,} characters",
            chars,
            lambda fresh=fresh: detector.score([Turn(question=QUESTION, answer=next(fresh))]),
        )
    fresh = answers(400)

    def turns() -> list[Turn]:
        return [Turn(question=QUESTION, answer=next(fresh)) for _ in range(BATCH)]

    row(f"score {BATCH} answers of 400 characters, one batch", BATCH * 400, lambda: detector.score(turns()))
    row(
        f"score {BATCH} answers of 400 characters, one by one",
        BATCH * 400,
        lambda: [detector.score([turn]) for turn in turns()],
    )
    rude = (Turn(question=QUESTION, answer=f"{RUDE}{number} times.") for number in itertools.count())
    written: list[int] = []
    ms = median_ms(lambda: written.append(len(detoxifier.rewrite([next(rude)])[0])), options.repeats)
    chars = statistics.mean(written)
    table.add_row(f"rewrite one answer ({chars:.0f} characters written)", f"{ms:,.1f}", f"{chars / ms * 1000.0:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
