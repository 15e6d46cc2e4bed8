"""Times many checks at once with and without batching.

In every round new answers of several lengths, so that no cache can help, are checked by two guards on the same model,
one after the other and in turns first, so that a busy machine slows both alike. `acheck` of all of a round starts at
once. Figures are medians over the rounds; ratios are taken within a round.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import QUESTION, environment, options_of

from mllm_protector_guard import BatchingDetector, Guard, GuardPolicy, Turn, load_detector

PROSE = (
    "Choose a sunny place and look at the soil before you buy anything, because most plants fail for want of drainage. "
    "Water in the morning, mulch against weeds, and give every plant the room it will need when it has grown. "
)
LENGTHS = (120, 250, 500, 1_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """All checks of a round by one guard.

    Attributes:
        total_s: From their start to the last verdict, seconds.
        median_s: Half of the checks took no longer, seconds.
    """

    total_s: float
    median_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The same answers, checked by both guards; `difference` is the largest between two scores of one answer."""

    apart: Checks
    together: Checks
    difference: float


def turns(number: int, count: int) -> list[Turn]:
    """Answers of several lengths, others for every `number`."""
    answers = (f"Advice {number}.{index}. {PROSE * 5}"[: LENGTHS[index % len(LENGTHS)]] for index in range(count))
    return [Turn(question=QUESTION, answer=answer) for answer in answers]


async def checked(guard: Guard, answers: list[Turn]) -> tuple[Checks, list[float]]:
    """How long the checks of all answers took that started at once, and the scores."""
    started = time.perf_counter()

    async def one(turn: Turn) -> tuple[float, float]:
        score = (await guard.acheck(turn)).harm_score
        assert score is not None
        return time.perf_counter() - started, score

    done = await asyncio.gather(*(one(turn) for turn in answers))
    times = [seconds for seconds, _ in done]
    checks = Checks(total_s=max(times), median_s=statistics.median(times))
    return checks, [score for _, score in done]


def measure(apart: Guard, together: Guard, number: int, count: int) -> Round:
    """One round; the guards take turns to be the first."""
    answers = turns(number, count)
    order = [apart, together] if number % 2 else [together, apart]
    found = {id(guard): asyncio.run(checked(guard, answers)) for guard in order}
    (without, alone), (batched, shared) = found[id(apart)], found[id(together)]
    difference = max(abs(a - b) for a, b in zip(alone, shared, strict=True))
    return Round(apart=without, together=batched, difference=difference)


def table(title: str, rounds: list[Round], count: int) -> Table:
    """The medians, and how many times as many answers a second batching gives."""
    ratios = sorted(r.apart.total_s / r.together.total_s for r in rounds)
    worst = max(r.difference for r in rounds)
    caption = (
        f"medians of {len(rounds)} rounds; batching gives {statistics.median(ratios):.2f}x the answers a second "
        f"({ratios[0]:.2f}x to {ratios[-1]:.2f}x); scores differ by at most {worst:.0e}"
    )
    result = Table(title=title, caption=caption)
    for column in ("checks", "answers/s", "median wait, s", "all, s"):
        result.add_column(column, justify="left" if column == "checks" else "right")
    for what, checks in (("apart", [r.apart for r in rounds]), ("batched", [r.together for r in rounds])):
        result.add_row(
            what,
            f"{statistics.median(count / c.total_s for c in checks):,.1f}",
            f"{statistics.median(c.median_s for c in checks):,.2f}",
            f"{statistics.median(c.total_s for c in checks):,.2f}",
        )
    return result


def main() -> None:
    """Prints one table, or JSON."""
    parser = options_of(main.__doc__)
    parser.add_argument("--checks", type=int, default=64, help="that start at once in a round")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-wait-ms", type=float, default=2.0)
    options = parser.parse_args()
    detector = load_detector(options.model, device=options.device, dtype=options.dtype)
    policy = GuardPolicy(on_harm="flag")
    with BatchingDetector(detector, max_batch=options.max_batch, max_wait_ms=options.max_wait_ms) as batching:
        apart, together = Guard(detector=detector, policy=policy), Guard(detector=batching, policy=policy)
        measure(apart, together, 0, min(4, options.checks))
        numbers = track(range(1, options.rounds + 1), description="rounds", console=Console(stderr=True))
        rounds = [measure(apart, together, number, options.checks) for number in numbers]
    if options.json:
        about = {
            **vars(options),
            **environment(detector),
        }
        print(json.dumps({**about, "rounds": [asdict(r) for r in rounds]}, indent=2))
        return
    Console().print(table(f"{options.model}: {options.checks} checks at once", rounds, options.checks))


if __name__ == "__main__":
    main()
