"""Guards a chain over the sample transcripts and prints what came out. Run it with `make demo`.

The chain is `model | ProtectorGuard()` with the default guard. The model only replays: it answers each question
with the answer that is written down for it in `transcripts.jsonl`, so that the run shows the guard and nothing else.
Pictures travel as image blocks of the message, as with any multimodal model.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from statistics import median
from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from langchain_mllm_protector import ProtectorGuard
from mllm_protector_guard import GuardError

HERE = Path(__file__).parent
STYLES = {"passed": "green", "detoxified": "cyan", "withheld": "yellow", "flagged": "yellow"}


class Transcript(BaseModel):
    """A question, perhaps with a picture, and the answer that a model gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    kind: Literal["harmless", "harmful", "refusal", "tricky"]
    question: str
    image: str | None
    answer: str

    def message(self) -> HumanMessage:
        """The question as a chat model gets it."""
        blocks: list[str | dict[str, Any]] = [{"type": "text", "text": self.question}]
        if self.image is not None:
            picture = base64.b64encode((HERE / "images" / self.image).read_bytes()).decode("ascii")
            blocks.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}})
        return HumanMessage(content=blocks)


class ReplayModel(BaseChatModel):
    """A chat model that answers each question with the answer written down for it."""

    answers: dict[str, str]

    @property
    def _llm_type(self) -> str:
        return "replay"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        question = str(messages[-1].text)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=self.answers[question]))])


class Row(BaseModel):
    """What became of one transcript.

    Attributes:
        transcript: What went in.
        outcome: passed, detoxified, withheld or flagged.
        harm_score: P(harmful) of the answer, [0, 1].
        rewrite_score: P(harmful) of the last rewrite, [0, 1]; None without a rewrite.
        attempts: How many rewrites were tried.
        text: What came out of the chain.
        question_match: How the guard found the question.
        images: How many images the guard found with it.
        ms: The whole call of the chain, milliseconds.
    """

    transcript: Transcript
    outcome: str
    harm_score: float | None
    rewrite_score: float | None
    attempts: int
    text: str
    question_match: str | None
    images: int
    ms: float

    @property
    def missed(self) -> bool:
        """Whether a harmful answer came out as it went in."""
        return self.transcript.kind == "harmful" and self.text == self.transcript.answer

    @property
    def wrongly_flagged(self) -> bool:
        """Whether an answer that is not harmful was taken for harmful."""
        return self.transcript.kind != "harmful" and self.outcome != "passed"


class Totals(BaseModel):
    """The sums over all rows; `missed` and `wrongly_flagged` hold ids, times are in milliseconds."""

    outcomes: dict[str, int]
    harmful: int
    missed: list[str]
    not_harmful: int
    wrongly_flagged: list[str]
    passed_unchanged: int
    question_matches: dict[str, int]
    images: int
    median_passed_ms: float | None
    median_rewritten_ms: float | None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Totals:
        """The totals of `rows`."""
        passed = [row for row in rows if row.outcome == "passed"]
        rewritten = [row.ms for row in rows if row.attempts]
        return cls(
            outcomes=dict(Counter(row.outcome for row in rows)),
            harmful=sum(row.transcript.kind == "harmful" for row in rows),
            missed=[row.transcript.id for row in rows if row.missed],
            not_harmful=sum(row.transcript.kind != "harmful" for row in rows),
            wrongly_flagged=[row.transcript.id for row in rows if row.wrongly_flagged],
            passed_unchanged=sum(row.text == row.transcript.answer for row in passed),
            question_matches=dict(Counter(str(row.question_match) for row in rows)),
            images=sum(row.images for row in rows),
            median_passed_ms=median(row.ms for row in passed) if passed else None,
            median_rewritten_ms=median(rewritten) if rewritten else None,
        )


def read_transcripts() -> list[Transcript]:
    """The sample transcripts, in the order of the file."""
    lines = (HERE / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()
    return [Transcript.model_validate_json(line) for line in lines]


def run(transcripts: Sequence[Transcript], guard: ProtectorGuard, console: Console) -> list[Row]:
    """One row for each transcript, each from one call of the chain; progress goes to `console`."""
    chain = ReplayModel(answers={each.question: each.answer for each in transcripts}) | guard
    with console.status("loading the models"):
        guard.warm_up()
        for each in transcripts[:1]:  # the first pass through a model is slower than all others
            chain.invoke([each.message()])
    rows = []
    for each in track(transcripts, "guarding", console=console, transient=True, disable=not console.is_terminal):
        message = each.message()
        started = time.perf_counter()
        answer = chain.invoke([message])
        ms = (time.perf_counter() - started) * 1000.0
        record = answer.response_metadata["protector"]
        found = {name: record[name] for name in Row.model_fields.keys() & record.keys() - {"text"}}
        rows.append(Row(transcript=each, text=str(answer.content), ms=ms, **found))
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """The rows for people; texts are cut to the width of the screen."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=True)
    for name in ("id", "kind", "image", "outcome"):
        table.add_column(name, no_wrap=True)
    table.add_column("harm", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    table.add_column("what came out", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("ms", justify="right", no_wrap=True)
    for row in rows:
        mistake = row.missed or row.wrongly_flagged
        table.add_row(
            row.transcript.id,
            row.transcript.kind,
            Path(row.transcript.image or "").stem,
            Text(row.outcome, style="bold red" if mistake else STYLES[row.outcome]),
            _score(row.harm_score),
            _score(row.rewrite_score),
            Text(" ".join(row.text.split())),
            f"{row.ms:,.0f}",
        )
    return table


def summary_of(totals: Totals) -> Table:
    """The totals for people."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("outcomes", _counts(totals.outcomes))
    stopped = f"{totals.harmful - len(totals.missed)} of {totals.harmful} stopped"
    leak = f"; LEAKED: {', '.join(totals.missed)}" if totals.missed else "; nothing leaked"
    table.add_row("harmful answers", Text(stopped + leak, style="bold red" if totals.missed else ""))
    kept = f"{totals.not_harmful - len(totals.wrongly_flagged)} of {totals.not_harmful} passed"
    wrong = f"; wrongly flagged: {', '.join(totals.wrongly_flagged)}" if totals.wrongly_flagged else ""
    table.add_row("all others", Text(kept + wrong, style="bold red" if totals.wrongly_flagged else ""))
    table.add_row("passed", f"{totals.passed_unchanged} of {totals.outcomes.get('passed', 0)} came out unchanged")
    table.add_row("questions", f"found by {_counts(totals.question_matches)}; {totals.images} with an image")
    table.add_row("median time", f"passed {_ms(totals.median_passed_ms)}, rewritten {_ms(totals.median_rewritten_ms)}")
    return table


def main() -> int:
    """Runs the demo; 0 unless it could not run, whatever the guard decided."""
    arguments = _arguments()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the transcripts hold more characters than some screens know
    notes = Console(stderr=True)
    try:
        rows = run(read_transcripts()[: arguments.limit], ProtectorGuard(), notes)
    except GuardError as error:
        notes.print(Text(f"the demo could not run: {error}", style="red"))
        return 2
    totals = Totals.of(rows)
    if arguments.json:
        print(json.dumps({"rows": [row.model_dump() for row in rows], "totals": totals.model_dump()}, indent=2))
        return 0
    screen = Console()
    screen.print(table_of(rows))
    screen.print()
    screen.print(summary_of(totals))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Guards a chain over the sample transcripts.")
    parser.add_argument("--limit", type=_count, metavar="N", help="only the first N transcripts")
    parser.add_argument("--json", action="store_true", help="print rows and totals as JSON")
    return parser.parse_args()


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _ms(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:,.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
