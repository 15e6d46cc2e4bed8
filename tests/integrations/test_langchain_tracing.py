"""What traces and handlers see of a check."""

import json
import logging
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.schemas import Run

from integrations.langchain_models import SAFE, EchoModel, ListSink, keyword_guard
from langchain_mllm_protector import ProtectorCallbackHandler, ProtectorGuard, capture
from mllm_protector_guard import Guard, GuardPolicy, GuardRecord, HarmfulAnswerError, JsonlSink
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier


class FullDisk:
    def emit(self, record: GuardRecord) -> None:
        raise OSError("no space left beside my secret")


class TreeTracer(BaseTracer):
    """Keeps finished root runs, as tracing back ends do."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.roots.append(run)


def flat(run: Run) -> list[Run]:
    return [run, *(below for child in run.child_runs for below in flat(child))]


async def test_every_check_is_recorded_once_on_every_path() -> None:
    sink = ListSink()
    config = {"callbacks": [ProtectorCallbackHandler(sink=sink)]}
    chain = EchoModel() | keyword_guard()
    chain.invoke("roses", config)
    chain.batch(["a", "bomb", "c"], config)
    list(chain.stream("d", config))
    await chain.ainvoke("e", config)
    await chain.abatch(["f", "bomb"], config)
    [chunk async for chunk in chain.astream("g", config)]
    assert sorted(record.outcome for record in sink.records) == ["detoxified"] * 2 + ["passed"] * 7
    assert len({record.id for record in sink.records}) == 9
    harmful = next(record for record in sink.records if record.outcome == "detoxified")
    assert (harmful.harm_score, harmful.rewrite_score, harmful.attempts) == (0.99, 0.01, 1)
    assert harmful.integration == "langchain"
    assert harmful.run_id is not None
    assert harmful.parent_run_id is not None


def test_the_record_of_the_message_is_the_record_of_the_event() -> None:
    sink = ListSink()
    out = keyword_guard().invoke(AIMessage("a bomb"), {"callbacks": [ProtectorCallbackHandler(sink=sink)]})
    assert GuardRecord.model_validate(out.response_metadata["protector"]) == sink.records[0]


def test_records_hold_no_text_unless_asked(tmp_path: Path) -> None:
    for trace_content in (False, True):
        path = tmp_path / f"{trace_content}.jsonl"
        handler = ProtectorCallbackHandler(sink=JsonlSink(path))
        guard = keyword_guard(trace_content=trace_content)
        out = (EchoModel(label="a bomb for") | guard).invoke("Aunt May", {"callbacks": [handler]})
        line = path.read_text()
        record = json.loads(line)
        assert record["harm_score"] == 0.99
        if trace_content:
            assert (record["question"], record["answer"], record["text"]) == ("Aunt May", "a bomb for Aunt May", SAFE)
        else:
            assert "Aunt May" not in line
            assert "bomb" not in line
            assert SAFE not in line
        assert "bomb" not in json.dumps(out.response_metadata)


def test_a_ready_guard_keeps_its_own_sinks_and_content_rule() -> None:
    own, extra = ListSink(), ListSink()
    ready = Guard(
        detector=KeywordDetector({"bomb"}),
        policy=GuardPolicy(on_harm="withhold"),
        sinks=[own],
        trace_content=True,
    )
    guard = ProtectorGuard(guard=ready, on_missing_question="withhold")
    guard.invoke("roses", {"callbacks": [ProtectorCallbackHandler(sink=extra)]})
    assert own.records == extra.records
    assert own.records[0].answer == "roses"
    assert own.records[0].outcome == "withheld"


def test_a_raised_harm_is_recorded() -> None:
    sink = ListSink()
    config = {"callbacks": [ProtectorCallbackHandler(sink=sink)]}
    with pytest.raises(HarmfulAnswerError):
        keyword_guard(on_harm="raise").batch(["a", "bomb"], config)
    assert [(record.outcome, record.harm_score) for record in sink.records] == [("passed", 0.01), ("withheld", 0.99)]


async def test_a_broken_sink_never_reaches_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    config = {"callbacks": [ProtectorCallbackHandler(sink=FullDisk())]}
    with caplog.at_level(logging.WARNING):
        assert keyword_guard().invoke("bomb", config) == SAFE
        assert await keyword_guard().ainvoke("bomb", config) == SAFE
    assert "FullDisk lost the record" in caplog.text
    assert "secret" not in caplog.text


def test_foreign_events_are_left_alone() -> None:
    sink = ListSink()
    handler = ProtectorCallbackHandler(sink=sink)
    handler.on_custom_event("someone.else", {"x": 1}, run_id=UUID(int=1))
    assert sink.records == []
    assert vars(handler) == {"sink": sink}


async def test_any_handler_gets_the_event() -> None:
    seen: list[tuple[str, Any]] = []

    class Sync(BaseCallbackHandler):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            seen.append((name, data))

    class Async(AsyncCallbackHandler):
        async def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            seen.append((name, data))

    keyword_guard().invoke("bomb", {"callbacks": [Sync()]})
    await keyword_guard().ainvoke("bomb", {"callbacks": [Async()]})
    assert [name for name, _ in seen] == ["mllm_protector.check"] * 2
    assert all(data["outcome"] == "detoxified" and json.dumps(data) for _, data in seen)


async def test_a_trace_shows_scores_and_rewrites() -> None:
    detoxifier = ScriptedDetoxifier(["still a bomb", SAFE])
    for use_async in (False, True):
        tracer = TreeTracer()
        chain = EchoModel(label="bomb") | keyword_guard(detoxifier=detoxifier)
        config = {"callbacks": [tracer]}
        out = await chain.ainvoke("q", config) if use_async else chain.invoke("q", config)
        runs = flat(tracer.roots[0])
        parser = next(run for run in runs if run.run_type == "parser")
        assert parser.name == "ProtectorGuard"
        assert parser.outputs["output"].response_metadata["protector"] == out.response_metadata["protector"]
        children = {f"{run.name} {run.inputs.get('attempt', '')}".strip(): run.outputs for run in parser.child_runs}
        assert list(children) == ["harm_detector", "detoxifier 0", "detoxifier 1"]
        assert children["harm_detector"]["harm_score"] == 0.99
        assert [children[f"detoxifier {i}"]["harm_score"] for i in (0, 1)] == [0.99, 0.01]
        assert "bomb" not in repr([(run.inputs, run.outputs) for run in parser.child_runs])


def test_a_blank_answer_shows_no_detector_run() -> None:
    tracer = TreeTracer()
    keyword_guard().invoke(AIMessage(""), {"callbacks": [tracer]})
    assert tracer.roots[0].child_runs == []


async def test_no_child_runs_are_made_when_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    note = capture.CAPTURE._open
    monkeypatch.setattr(capture.CAPTURE, "_open", lambda *args: (opened.append("run"), note(*args)))
    guard = keyword_guard()
    guard.invoke("a bomb")
    await guard.ainvoke("a bomb")
    assert len(opened) == 2
    guard.invoke("a bomb", {"callbacks": [BaseCallbackHandler()]})
    assert len(opened) == 5
