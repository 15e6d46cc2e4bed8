"""Makes training rows with a chat model, a draft at a time, as many at once as one likes."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_protector_guard.training.drafts import (
    PROTOCOLS,
    BadReplyError,
    Brief,
    ChatModel,
    Draft,
    Messages,
    ProtocolName,
    make_brief,
    prompts,
)
from mllm_protector_guard.training.endpoint import BudgetSpentError, Meter
from mllm_protector_guard.training.scenarios import Scenario
from mllm_protector_guard.training.shingles import NearTexts

__all__ = ["GenerationPlan", "GenerationReport", "MeteredChat", "generate", "planned_prompts"]

RowShape = Literal["triples", "detector"]

_LICENCE = "generated; see the model's terms"
_REPEATED = "question was there already"
_HOPELESS = 30
"""Useless replies after which a run without a single usable one is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """What to make.

    Attributes:
        scenarios: Fields of harm.
        count: Drafts for each of them.
        protocol: How the model is asked.
        shape: "triples", or two "detector" rows a draft.
        languages: Drawn from for each draft.
        tries: How often a draft is asked for before it counts as missing.
        concurrency: Drafts that are asked for at once.
        similarity: Jaccard index of the shingles from which two questions count as the same, in (0, 1].
        seed: Another seed gives other drafts.
    """

    scenarios: Sequence[Scenario]
    count: int
    protocol: ProtocolName = "json"
    shape: RowShape = "triples"
    languages: Sequence[str] = ("English",)
    tries: int = 3
    concurrency: int = 4
    similarity: float = 0.7
    seed: int = 0

    def items(self) -> Iterator[_Item]:
        """Every draft to make, the scenarios in turn, so that a run that is stopped has something of each."""
        for number in range(self.count):
            for scenario in self.scenarios:
                yield _Item(scenario, number)

    def unfinished(self, finished: Iterable[Mapping[str, Any]]) -> list[_Item]:
        """The drafts that are to be made after these rows of an earlier run."""
        extras = (row.get("extra") or {} for row in finished)
        done = {(extra.get("scenario"), extra.get("item")) for extra in extras}
        return [item for item in self.items() if (item.scenario.name, item.number) not in done]


@dataclass(frozen=True, slots=True)
class _Item:
    scenario: Scenario
    number: int
    tried: int = 0

    def brief(self, plan: GenerationPlan) -> Brief:
        return make_brief(self.scenario, plan.languages, self._key(plan))

    def seed(self, plan: GenerationPlan) -> int:
        """A number below 2^31, which all endpoints take."""
        return int.from_bytes(hashlib.blake2b(self._key(plan).encode(), digest_size=4).digest()) >> 1

    def _key(self, plan: GenerationPlan) -> str:
        return f"{plan.seed}/{self.scenario.name}/{self.number}/{self.tried}"


@dataclass(slots=True)
class GenerationReport:
    """How a run went.

    Attributes:
        made: Drafts that were written, without those of earlier runs.
        missing: Drafts for which no try gave a usable reply.
        bad: Replies that could not be used, by reason.
        stopped: Why the run ended early, if it did.
    """

    made: int = 0
    missing: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    stopped: str | None = None


class MeteredChat:
    """A chat model whose every reply is counted as a request.

    Args:
        chat: The model.
        meter: Counts, and may say stop.
    """

    def __init__(self, chat: ChatModel, meter: Meter) -> None:
        self.name = chat.name
        self._chat = chat
        self._meter = meter

    def reply(self, messages: Messages, *, seed: int) -> str:
        """The model's reply.

        Raises:
            BudgetSpentError: The meter lets no request through.
        """
        self._meter.begin()
        return self._chat.reply(messages, seed=seed)


def planned_prompts(plan: GenerationPlan) -> Iterator[dict[str, Any]]:
    """For each draft the prompts of its first try; asks nobody."""
    for item in plan.items():
        yield {
            "scenario": item.scenario.name,
            "item": item.number,
            "prompts": [list(map(dict, one)) for one in prompts(item.brief(plan), plan.protocol)],
        }


def generate(
    plan: GenerationPlan,
    chat: ChatModel,
    meter: Meter,
    *,
    write: Callable[[Mapping[str, Any]], None],
    finished: Iterable[Mapping[str, Any]] = (),
    known_questions: Iterable[str] = (),
    on_draft: Callable[[GenerationReport], None] = lambda report: None,
) -> GenerationReport:
    """Asks for every draft of the plan that is not finished, and writes its rows as soon as they are there.

    When a request fails for good, a limit is reached or the run is interrupted, no further request is begun, and what
    is under way is still written.

    Args:
        plan: What to make.
        chat: Writes the texts.
        meter: Keeps the budget; the chat model counts with it.
        write: Takes each row, in the calling thread.
        finished: Rows of earlier runs of the same plan.
        known_questions: Questions that are not to be asked again.
        on_draft: Told how it goes, after each reply.

    Raises:
        InferenceError: The model failed for good.
        ConfigError: The model refuses the request.
    """
    run = _Run(plan, chat, meter, write)
    run.skip(finished, known_questions)
    return run.go(on_draft)


class _Run:
    def __init__(
        self, plan: GenerationPlan, chat: ChatModel, meter: Meter, write: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._plan = plan
        self._chat = chat
        self._meter = meter
        self._write = write
        self._seen = NearTexts(plan.similarity)
        self._waiting = deque(plan.items())
        self._report = GenerationReport()
        self._failure: BaseException | None = None

    def skip(self, finished: Iterable[Mapping[str, Any]], known_questions: Iterable[str]) -> None:
        rows = list(finished)
        self._waiting = deque(self._plan.unfinished(rows))
        for question in [*(row.get("question") or "" for row in rows), *known_questions]:
            self._seen.add(question)

    def go(self, on_draft: Callable[[GenerationReport], None]) -> GenerationReport:
        with ThreadPoolExecutor(self._plan.concurrency, thread_name_prefix="mllm-protector-generate") as pool:
            running: dict[Future[Draft], _Item] = {}
            try:
                while self._waiting or running:
                    while self._waiting and len(running) < self._plan.concurrency:
                        item = self._waiting.popleft()
                        running[pool.submit(self._ask, item)] = item
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._take(running.pop(future), future)
                        on_draft(self._report)
            except BaseException:
                self._meter.stop()
                for future in wait(running).done:  # they are paid for
                    self._take(running[future], future)
                raise
        if self._failure is not None:
            raise self._failure
        return self._report

    def _ask(self, item: _Item) -> Draft:
        plan = self._plan
        return PROTOCOLS[plan.protocol](item.brief(plan), self._chat, item.seed(plan))

    def _take(self, item: _Item, future: Future[Draft]) -> None:
        error = future.exception()
        if error is None:
            draft = future.result()
            if self._seen.add(draft.question):
                for row in self._rows(item, draft):
                    self._write(row)
                self._report.made += 1
            else:
                self._try_again(item, _REPEATED)
        elif isinstance(error, BadReplyError):
            self._try_again(item, str(error))
        else:
            self._stop(error)

    def _try_again(self, item: _Item, reason: str) -> None:
        self._report.bad[reason] += 1
        if item.tried + 1 >= self._plan.tries:
            self._report.missing += 1
        elif self._report.stopped is None and self._failure is None:
            self._waiting.appendleft(_Item(item.scenario, item.number, item.tried + 1))
        if not self._report.made and self._report.bad.total() >= _HOPELESS and self._waiting:
            self._stop(BudgetSpentError(f"none of the first {_HOPELESS} replies was usable"))

    def _stop(self, error: BaseException) -> None:
        self._waiting.clear()
        if isinstance(error, BudgetSpentError):
            self._report.stopped = self._report.stopped or str(error)
        else:
            self._failure = self._failure or error
            self._meter.stop()

    def _rows(self, item: _Item, draft: Draft) -> Iterator[dict[str, Any]]:
        brief = item.brief(self._plan)
        extra = {
            "scenario": item.scenario.name,
            "item": item.number,
            "model": self._chat.name,
            "lang": brief.language,
            "image": brief.image,
            "licence": _LICENCE,
        }
        if self._plan.shape == "triples":
            yield {**draft.model_dump(), "source": "generated", "extra": extra}
            return
        for answer, harmful in ((draft.rejected, True), (draft.accepted, False)):
            yield {
                "question": draft.question,
                "answer": answer,
                "harmful": harmful,
                "source": "generated",
                "extra": {**extra, "labeler": "by construction"},
            }
