"""The events that the guard sends to LlamaIndex's dispatcher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import llama_index.core.instrumentation as instrument
import pytest
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import PrivateAttr

from llama_index_mllm_protector import (
    ProtectorPostprocessor,
    ProtectorQueryEngine,
    ProtectorRewriteEvent,
    ProtectorScoreEvent,
)
from mllm_protector_guard import Guard, GuardPolicy, GuardRecord, HarmfulAnswerError
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

Event = ProtectorScoreEvent | ProtectorRewriteEvent


class Collecting(BaseEventHandler):
    _events: list[Event] = PrivateAttr(default_factory=list)

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if isinstance(event, Event):
            self._events.append(event)


class Answering(CustomQueryEngine):
    answer: str

    def custom_query(self, query_str: str) -> str:
        return self.answer


class Keeping:
    def __init__(self) -> None:
        self.records: list[GuardRecord] = []

    def emit(self, record: GuardRecord) -> None:
        self.records.append(record)


@pytest.fixture
def events() -> Iterator[list[Event]]:
    handler, root = Collecting(), instrument.get_dispatcher()
    root.add_event_handler(handler)
    yield handler._events
    root.event_handlers.remove(handler)


def make_guard(*, rewrites: Sequence[str] = ("A garden.",), trace_content: bool = False, **policy: object) -> Guard:
    return Guard(
        detector=KeywordDetector({"bomb"}),
        detoxifier=ScriptedDetoxifier(rewrites),
        policy=GuardPolicy(**policy),
        sinks=[Keeping()],
        trace_content=trace_content,
    )


def kinds(events: Sequence[Event]) -> list[str]:
    return [event.class_name() for event in events]


async def test_one_score_event_an_answer_and_one_rewrite_event_an_attempt(events: list[Event]) -> None:
    guard = make_guard(rewrites=["still a bomb", "A garden."])
    engine = ProtectorQueryEngine(Answering(answer="A bomb."), guard=guard)
    expected = ["ProtectorScoreEvent", "ProtectorRewriteEvent", "ProtectorRewriteEvent"]
    responses = [engine.query("How?")]
    assert kinds(events) == expected
    responses.append(await engine.aquery("How?"))
    assert kinds(events) == expected * 2
    for response, (score, first, second) in zip(responses, (events[:3], events[3:]), strict=True):
        assert (score.harm_score, score.threshold, score.outcome, score.attempts) == (0.99, 0.5, "detoxified", 2)
        assert (first.attempt, first.harm_score, first.accepted) == (0, 0.99, False)
        assert (second.attempt, second.harm_score, second.accepted) == (1, 0.01, True)
        assert {score.check_id, first.check_id, second.check_id} == {response.metadata["protector"]["id"]}


async def test_passed_checks_send_scores_too(events: list[Event]) -> None:
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("Roses.", "A bomb.", "")]
    postprocessor = ProtectorPostprocessor(guard=make_guard(on_harm="withhold"))
    postprocessor.postprocess_nodes(nodes)
    await postprocessor.apostprocess_nodes(nodes)
    assert [event.outcome for event in events] == ["passed", "withheld", "passed"] * 2
    assert [event.harm_score for event in events] == [0.01, 0.99, None] * 2
    assert not any(event.question_known for event in events)


async def test_checks_that_raise_send_their_scores(events: list[Event]) -> None:
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("A bomb.", "Roses.")]
    postprocessor = ProtectorPostprocessor(guard=make_guard(on_harm="raise"))
    with pytest.raises(HarmfulAnswerError):
        postprocessor.postprocess_nodes(nodes)
    with pytest.raises(HarmfulAnswerError):
        await postprocessor.apostprocess_nodes(nodes)
    assert [event.outcome for event in events] == ["withheld", "passed"] * 2


@pytest.mark.parametrize("trace_content", [False, True])
def test_texts_only_with_trace_content(events: list[Event], trace_content: bool) -> None:
    guard = make_guard(trace_content=trace_content)
    response = ProtectorQueryEngine(Answering(answer="A bomb."), guard=guard).query("A secret question?")
    score, rewrite = events
    if trace_content:
        assert (score.question, score.answer, rewrite.text) == ("A secret question?", "A bomb.", "A garden.")
        assert response.metadata["protector"]["answer"] == "A bomb."
    else:
        dumped = f"{score.model_dump()}{rewrite.model_dump()}{response.metadata}"
        assert not [text for text in ("secret", "A bomb.", "A garden.") if text in dumped]


def test_sinks_get_the_same_record_with_the_span_it_came_from(events: list[Event]) -> None:
    guard = make_guard()
    response = ProtectorQueryEngine(Answering(answer="Roses."), guard=guard).query("How?")
    (record,) = guard.sinks[0].records
    assert record.model_dump(mode="json", exclude_none=True) == response.metadata["protector"]
    assert record.integration == "llama_index"
    assert record.run_id.startswith("ProtectorQueryEngine._query-")
