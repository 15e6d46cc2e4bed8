"""Times a detector on one answer while it streams against one pass over the whole answer.

In every round a new answer, so that no cache can help, is scored in several ways one after the other, so that a busy
machine slows all of them alike: `score` of the whole answer once, streams that are fed one, two and four sentences at a
time, and `score` of the answer so far at each sentence. Figures are medians over the rounds; ratios are taken within a
round.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import QUESTION, environment, options_of

from mllm_protector_guard import Turn, load_detector
from mllm_protector_guard.models.detector import TransformersDetector

PROSE = (
    "Choose a sunny place and look at the soil before you buy anything, because most plants fail for want of drainage.",
    "Water in the morning, mulch against weeds, and give every plant the room it will need when it has grown.",
    "Nobody needs many tools.",
    "If the leaves turn yellow, wait a week before you feed them, for too much water is more often the cause.",
)
GROUPS = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A stream that was fed so many sentences at a time.

    Attributes:
        group: Sentences a feed.
        total_ms: All feeds together.
        first_ms: The first feed.
        longest_ms: The longest feed.
        difference: Between the last feed's score and that of the whole answer.
    """

    group: int
    total_ms: float
    first_ms: float
    longest_ms: float
    difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One answer, scored in several ways.

    Attributes:
        whole_ms: One pass over the whole answer.
        streams: One a group size.
        rescoring_ms: All passes over the answer so far together, one a sentence.
    """

    whole_ms: float
    streams: list[Stream]
    rescoring_ms: float


def sentences(number: int, count: int) -> list[str]:
    """An answer in sentences, another for every `number`; each but the first begins with a space."""
    return [f"{' ' if i else ''}Advice {number}.{i}: {PROSE[i % len(PROSE)]}" for i in range(count)]


def timed_ms(detector: TransformersDetector, answer: str) -> tuple[float, float]:
    """Duration of one `score`, milliseconds, and the score."""
    started = time.perf_counter()
    (score,) = detector.score([Turn(question=QUESTION, answer=answer)])
    return (time.perf_counter() - started) * 1000.0, score


def fed(detector: TransformersDetector, pieces: list[str], group: int, whole: float) -> Stream:
    """A stream over one answer, whose score as a whole is `whole`."""
    stream = detector.open_stream(QUESTION)
    feeds, last = [], 0.0
    for start in range(0, len(pieces), group):
        started = time.perf_counter()
        last = stream.feed("".join(pieces[start : start + group]))
        feeds.append((time.perf_counter() - started) * 1000.0)
    stream.close()
    return Stream(
        group=group, total_ms=sum(feeds), first_ms=feeds[0], longest_ms=max(feeds), difference=abs(last - whole)
    )


def measure(detector: TransformersDetector, pieces: list[str]) -> Round:
    """One answer, scored in several ways."""
    whole_ms, whole = timed_ms(detector, "".join(pieces))
    streams = [fed(detector, pieces, group, whole) for group in GROUPS]
    rescoring_ms = sum(timed_ms(detector, "".join(pieces[: count + 1]))[0] for count in range(len(pieces)))
    return Round(whole_ms=whole_ms, streams=streams, rescoring_ms=rescoring_ms)


def table(title: str, rounds: list[Round]) -> Table:
    """The medians, and how often one pass over the whole answer fits into each."""
    worst = max(stream.difference for r in rounds for stream in r.streams)
    result = Table(title=title, caption=f"medians of {len(rounds)} rounds; scores differ by at most {worst:.0e}")
    for column in ("what", "ms", "over one pass", "first feed, ms", "longest, ms"):
        result.add_column(column, justify="left" if column == "what" else "right")
    whole = [r.whole_ms for r in rounds]

    def row(what: str, times: list[float], *more: list[float]) -> None:
        ratio = statistics.median(time / base for time, base in zip(times, whole, strict=True))
        result.add_row(
            what, f"{statistics.median(times):,.0f}", f"{ratio:.2f}x", *(f"{statistics.median(m):,.0f}" for m in more)
        )

    row("the whole answer in one pass", whole)
    for index, group in enumerate(GROUPS):
        streams = [r.streams[index] for r in rounds]
        row(
            f"a stream, sentences a feed: {group}",
            [stream.total_ms for stream in streams],
            [stream.first_ms for stream in streams],
            [stream.longest_ms for stream in streams],
        )
    row("the answer so far, at every sentence", [r.rescoring_ms for r in rounds])
    return result


def main() -> None:
    """Prints one table, or JSON."""
    parser = options_of(main.__doc__)
    parser.add_argument("--sentences", type=int, default=36, help="36 make about 1,000 tokens")
    options = parser.parse_args()
    detector = load_detector(options.model, device=options.device, dtype=options.dtype)
    measure(detector, sentences(0, 3))
    tokens = len(detector._ready().tokenizer("".join(sentences(1, options.sentences)))["input_ids"])
    console = Console(stderr=True)
    numbers = track(range(1, options.rounds + 1), description="rounds", console=console)
    rounds = [measure(detector, sentences(number, options.sentences)) for number in numbers]
    if options.json:
        about = {
            "model": options.model,
            **environment(detector),
            "answer_tokens": tokens,
            "sentences": options.sentences,
        }
        print(json.dumps({**about, "rounds": [asdict(r) for r in rounds]}, indent=2))
        return
    Console().print(table(f"{options.model}: {tokens:,} tokens in {options.sentences} sentences", rounds))


if __name__ == "__main__":
    main()
