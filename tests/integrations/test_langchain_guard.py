"""The guard as a runnable: settings, kinds of input, outcomes, batches."""

import asyncio
import copy
import json
import pickle
import threading
import time
from collections.abc import Sequence

import pytest
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough

from integrations.langchain_models import SAFE, EchoModel, asked, keyword_guard
from langchain_mllm_protector import ProtectorGuard
from mllm_protector_guard import (
    DEFAULT_REFUSAL,
    ConfigError,
    DetectorError,
    Guard,
    GuardError,
    GuardPolicy,
    HarmfulAnswerError,
    Turn,
)
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

HARMFUL = "First build a bomb."


class BrokenDetector:
    def score(self, turns: Sequence[Turn]) -> list[float]:
        raise RuntimeError(f"out of memory while scoring {turns[0].answer}")


# -- settings ---------------------------------------------------------------------------------------


def test_building_a_guard_loads_nothing() -> None:
    guard = ProtectorGuard(model="/no/such/model")
    with pytest.raises(GuardError):
        guard.invoke("hello")


def test_default_guard_needs_no_argument() -> None:
    assert ProtectorGuard().model == "smollm2-135m"


@pytest.mark.parametrize(
    "setting",
    [
        {"threshold": 0.3},
        {"model": "other"},
        {"detector": KeywordDetector({"x"})},
        {"detoxifier": "other"},
        {"on_harm": "flag"},
        {"on_error": "pass"},
        {"max_attempts": 3},
        {"timeout_s": 1.0},
        {"refusal": "No."},
        {"device": "cpu"},
        {"dtype": "float32"},
        {"local_files_only": True},
        {"trace_content": True},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_ready_guard_excludes_other_settings(setting: dict[str, object]) -> None:
    ready = Guard(detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="withhold"))
    with pytest.raises(ConfigError, match=repr(next(iter(setting)))):
        ProtectorGuard(guard=ready, **setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"threshold": 1.5},
        {"on_harm": "ignore"},
        {"on_missing_question": "guess"},
        {"max_attempts": 0},
        {"refusal": ""},
        {"rails": "no_bombs.yaml"},
        {"detector": object()},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_cannot_work_is_an_error(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ProtectorGuard(**setting)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        keyword_guard().threshold = 0.9


def test_a_ready_guard_decides() -> None:
    ready = Guard(detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="withhold", refusal="No."))
    chain = FakeListChatModel(responses=[HARMFUL]) | ProtectorGuard(guard=ready)
    assert chain.invoke("hi").content == "No."


def test_models_are_made_once_for_all_threads() -> None:
    guard = keyword_guard()
    engines: list[Guard] = []
    start = threading.Barrier(8)

    def use() -> None:
        start.wait()
        engines.append(guard._engine())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(engine) for engine in engines}) == 1


def test_pickle_and_copy_keep_the_settings() -> None:
    guard = ProtectorGuard(model="/no/such/model", threshold=0.3, on_harm="withhold")
    with pytest.raises(GuardError):
        guard.invoke("hello")
    for twin in (pickle.loads(pickle.dumps(guard)), copy.copy(guard), copy.deepcopy(guard)):
        assert twin == guard
        assert twin.threshold == 0.3


def test_a_setting_can_be_configurable() -> None:
    guard = keyword_guard(on_harm="withhold").configurable_fields(threshold=ConfigurableField(id="threshold"))
    assert guard.invoke(HARMFUL) == DEFAULT_REFUSAL
    assert guard.invoke(HARMFUL, {"configurable": {"threshold": 1.0}}) == HARMFUL


def test_schemas_name_the_kinds() -> None:
    guard = keyword_guard()
    assert "AIMessage" in json.dumps(guard.get_input_jsonschema())
    assert {"type": "string"} in guard.get_output_jsonschema()["anyOf"]


# -- kinds of input ---------------------------------------------------------------------------------


def test_str_in_str_out() -> None:
    assert keyword_guard().invoke("Plant roses.") == "Plant roses."
    assert keyword_guard().invoke(HARMFUL) == SAFE


@pytest.mark.parametrize("kind", [AIMessage, AIMessageChunk])
def test_message_keeps_class_id_usage_and_calls(kind: type[AIMessage]) -> None:
    message = kind(
        content=HARMFUL,
        id="msg-1",
        name="assistant",
        usage_metadata={"input_tokens": 3, "output_tokens": 5, "total_tokens": 8},
        tool_calls=[{"name": "look_up", "args": {"q": "x"}, "id": "call-1"}],
        response_metadata={"model_name": "m-1", "finish_reason": "stop", "token_usage": {"total": 8}},
    )
    before = message.model_copy(deep=True)
    out = keyword_guard().invoke(message)
    assert type(out) is kind
    assert out.content == SAFE
    assert (out.id, out.name, out.usage_metadata, out.tool_calls) == (
        message.id,
        message.name,
        message.usage_metadata,
        message.tool_calls,
    )
    record = out.response_metadata.pop("protector")
    assert out.response_metadata == message.response_metadata
    assert record["outcome"] == "detoxified"
    assert record["integration"] == "langchain"
    assert record["harm_score"] == 0.99
    assert record["rewrite_score"] == 0.01
    assert json.loads(json.dumps(record)) == record
    assert message == before


def test_a_passed_message_is_untouched() -> None:
    content = [
        {"type": "reasoning", "reasoning": "roses, then"},
        {"type": "text", "text": "Plant ", "annotations": [{"type": "citation", "url": "https://a.example"}]},
        "roses.",
        {"type": "image", "base64": "aGk=", "mime_type": "image/png"},
        {"type": "non_standard", "value": {"x": 1}},
    ]
    message = AIMessage(content=copy.deepcopy(content), additional_kwargs={"reasoning_content": "hm"}, id="m")
    guard = keyword_guard()
    out = guard.invoke(message)
    assert out.content == content
    assert out.additional_kwargs == message.additional_kwargs
    assert out.response_metadata["protector"]["outcome"] == "passed"
    assert asked(guard)[0].answer == "Plant roses."
    assert "protector" not in message.response_metadata


def test_harm_split_over_blocks_is_seen() -> None:
    out = keyword_guard().invoke(AIMessage(content=[{"type": "text", "text": "a bo"}, {"type": "text", "text": "mb"}]))
    assert out.content == [{"type": "text", "text": SAFE}]


@pytest.mark.parametrize("content", ["", [], "  \n", [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]])
def test_tool_calls_without_any_text_pass_as_blank(content: str | list[dict[str, object]]) -> None:
    message = AIMessage(content=content, tool_calls=[{"name": "f", "args": {"n": 3, "q": " "}, "id": "c"}])
    guard = keyword_guard()
    out = guard.invoke(message)
    assert (out.content, out.tool_calls) == (content, message.tool_calls)
    assert out.response_metadata["protector"]["reason"] == "blank"
    assert asked(guard) == []


def test_dict_gives_the_answer_in_its_own_type() -> None:
    guard = keyword_guard()
    assert guard.invoke({"question": "How?", "answer": HARMFUL, "context": "ignored"}) == SAFE
    out = guard.invoke({"question": [("system", "Be kind."), ("human", "Why?")], "answer": AIMessage(HARMFUL, id="m")})
    assert (out.content, out.id) == (SAFE, "m")
    assert [turn.question for turn in asked(guard)] == ["How?", "How?", "Why?", "Why?"]
    assert out.response_metadata["protector"]["question_match"] == "explicit"


def test_assign_keeps_the_dict() -> None:
    chain = RunnablePassthrough.assign(answer=keyword_guard())
    value = {"question": "How?", "context": "c", "answer": HARMFUL}
    assert chain.invoke(value) == {**value, "answer": SAFE}


def test_an_empty_question_is_known_and_a_missing_one_is_not() -> None:
    guard = keyword_guard()
    guard.batch([{"question": "", "answer": "a"}, {"question": None, "answer": "b"}, {"answer": "c"}])
    assert [turn.question for turn in asked(guard)] == ["", None, None]


@pytest.mark.parametrize(
    "value",
    [3, None, ChatPromptValue(messages=[]), {"answer": 3}, [AIMessage("x")], {"question": 3, "answer": "secret"}],
)
def test_what_holds_no_answer_is_an_error(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        keyword_guard().invoke(value)
    assert "secret" not in str(caught.value)


def test_a_question_that_is_no_message_does_not_show_in_the_error() -> None:
    with pytest.raises(TypeError) as caught:
        keyword_guard().invoke({"question": [{"secret": "word"}], "answer": "a"})
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_hard_texts_pass_byte_for_byte() -> None:
    guard = keyword_guard()
    for text in ["\ud800 lone", "nul \x00 byte", "\u202eright to left", "zero\u200bwidth", "x" * 200_000]:
        assert guard.invoke(text) == text
        out = guard.invoke(AIMessage(text))
        assert out.content == text
        json.dumps(out.response_metadata)


def test_llm_text_is_guarded() -> None:
    guard = keyword_guard()
    assert (FakeListLLM(responses=[HARMFUL]) | guard).invoke("How?") == SAFE
    assert asked(guard)[0].question == "How?"


def test_prompt_model_parser_guard() -> None:
    guard = keyword_guard()
    prompt = ChatPromptTemplate.from_messages([("system", "Be kind."), ("human", "{q}")])
    chain = prompt | FakeListChatModel(responses=["Plant roses.", HARMFUL]) | StrOutputParser() | guard
    assert chain.invoke({"q": "What now?"}) == "Plant roses."
    assert chain.invoke({"q": "And then?"}) == SAFE
    assert [turn.question for turn in asked(guard)] == ["What now?", "And then?", "And then?"]


# -- outcomes ---------------------------------------------------------------------------------------


def test_a_harmful_rewrite_is_withheld() -> None:
    guard = keyword_guard(detoxifier=ScriptedDetoxifier(["a bomb", "still a bomb"]), refusal="No.")
    out = guard.invoke(AIMessage(HARMFUL))
    assert out.content == "No."
    assert out.response_metadata["protector"]["reason"] == "rewrite_rejected"
    assert out.response_metadata["protector"]["attempts"] == 2


def test_flag_marks_and_lets_through() -> None:
    out = keyword_guard(on_harm="flag").invoke(AIMessage(HARMFUL, additional_kwargs={"reasoning_content": "x"}))
    assert out.content == HARMFUL
    assert out.additional_kwargs == {"reasoning_content": "x"}
    assert out.response_metadata["protector"]["outcome"] == "flagged"


async def test_raise_raises_everywhere_and_shows_no_text() -> None:
    guard = keyword_guard(on_harm="raise")
    with pytest.raises(HarmfulAnswerError) as caught:
        guard.invoke(HARMFUL)
    assert "bomb" not in str(caught.value)
    assert caught.value.result.harm_score == 0.99
    with pytest.raises(HarmfulAnswerError):
        await guard.ainvoke(HARMFUL)
    with pytest.raises(HarmfulAnswerError):
        list((EchoModel(label="bomb") | guard).stream("hi"))
    with pytest.raises(HarmfulAnswerError):
        guard.batch(["a", HARMFUL])


def test_a_crashed_detector_withholds() -> None:
    out = keyword_guard(detector=BrokenDetector()).invoke(AIMessage("Plant roses."))
    assert out.content == DEFAULT_REFUSAL
    assert out.response_metadata["protector"]["error"] == "DetectorError"


def test_a_crashed_detector_passes_only_on_request() -> None:
    assert keyword_guard(detector=BrokenDetector(), on_error="pass").invoke("Plant roses.") == "Plant roses."
    with pytest.raises(DetectorError) as caught:
        keyword_guard(detector=BrokenDetector(), on_error="raise").invoke("Plant roses.")
    assert "roses" not in str(caught.value)


# -- missing question -------------------------------------------------------------------------------


def test_missing_question_is_judged_alone_by_default() -> None:
    guard = keyword_guard()
    out = guard.invoke(AIMessage("Plant roses."))
    assert asked(guard)[0].question is None
    assert out.response_metadata["protector"]["question_match"] == "none"


def test_missing_question_can_warn(caplog: pytest.LogCaptureFixture) -> None:
    keyword_guard(on_missing_question="warn").batch(["roses", {"question": "q", "answer": "tulips"}])
    assert "1 of 2 answers" in caplog.text
    assert "roses" not in caplog.text


def test_missing_question_can_withhold_without_hurting_neighbours() -> None:
    guard = keyword_guard(on_missing_question="withhold", refusal="No.")
    answers = guard.batch(["roses", {"question": "q", "answer": "tulips"}, "", {"question": "q", "answer": HARMFUL}])
    assert answers == ["No.", "tulips", "", SAFE]
    record = guard.invoke(AIMessage("roses")).response_metadata["protector"]
    assert (record["outcome"], record["reason"], record["error"]) == ("withheld", "error", "DetectorError")


def test_missing_question_can_raise() -> None:
    guard = keyword_guard(on_missing_question="raise", on_error="pass")
    with pytest.raises(DetectorError, match="__protector_question"):
        guard.invoke("roses")
    assert guard.invoke({"question": "q", "answer": "roses"}) == "roses"


# -- batches and async ------------------------------------------------------------------------------


def test_batch_is_one_detector_batch_in_order() -> None:
    guard = keyword_guard()
    answers = [f"answer {i}" for i in range(50)]
    assert guard.batch(answers) == answers
    assert [len(call) for call in guard.detector.calls] == [50]
    assert guard.batch([]) == []


async def test_abatch_is_one_detector_batch_in_order() -> None:
    guard = keyword_guard()
    answers = [f"answer {i}" for i in range(50)]
    assert await guard.abatch(answers) == answers
    assert [len(call) for call in guard.detector.calls] == [50]


def test_batch_of_a_chain_is_one_detector_batch_with_each_question() -> None:
    guard = keyword_guard()
    questions = [f"question {i}" for i in range(24)]
    out = (EchoModel(slow_s=0.01) | guard).batch(questions, {"max_concurrency": 12})
    assert [message.content for message in out] == [f"answer to {q}" for q in questions]
    assert [len(call) for call in guard.detector.calls] == [24]
    assert [turn.question for turn in asked(guard)] == questions


def test_batch_takes_a_config_for_each_input() -> None:
    guard = keyword_guard()
    guard.batch(["a", "b"], [{"configurable": {"__protector_question": q}} for q in ("q1", "q2")])
    assert [turn.question for turn in asked(guard)] == ["q1", "q2"]


async def test_batch_returns_exceptions_in_their_places() -> None:
    guard = keyword_guard(on_harm="raise")
    inputs = ["a", HARMFUL, 3, "d"]
    for out in (guard.batch(inputs, return_exceptions=True), await guard.abatch(inputs, return_exceptions=True)):
        assert [out[0], out[3]] == ["a", "d"]
        assert isinstance(out[1], HarmfulAnswerError)
        assert isinstance(out[2], TypeError)
    with pytest.raises(TypeError):
        guard.batch(["a", 3])


async def test_async_is_the_same_as_sync_and_leaves_the_loop_free() -> None:
    class SlowDetector(KeywordDetector):
        def score(self, turns: Sequence[Turn]) -> list[float]:
            time.sleep(0.2)
            return super().score(turns)

    guard = keyword_guard(detector=SlowDetector({"bomb"}), on_harm="withhold")
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    out = await guard.ainvoke(AIMessage(HARMFUL, id="m"))
    ticking.cancel()
    assert ticks >= 5
    assert out.content == guard.invoke(AIMessage(HARMFUL, id="m")).content == DEFAULT_REFUSAL


def test_it_is_an_output_parser() -> None:
    guard = keyword_guard()
    assert guard.parse(HARMFUL) == SAFE
    prompt = ChatPromptTemplate.from_messages([("human", "How?")]).invoke({})
    assert guard.parse_with_prompt(HARMFUL, prompt) == SAFE
    assert [turn.question for turn in asked(guard)] == [None, None, "How?", "How?"]


def test_a_message_guarded_in_a_state_replaces_the_harmful_one() -> None:
    graph_message = pytest.importorskip("langgraph.graph.message")
    harmful = AIMessage(HARMFUL, id="m-7")
    state = graph_message.add_messages([HumanMessage("hi", id="h"), harmful], [keyword_guard().invoke(harmful)])
    assert [message.content for message in state] == ["hi", SAFE]


def test_it_works_behind_lambdas() -> None:
    chain = RunnableLambda(lambda q: AIMessage(HARMFUL)) | keyword_guard() | RunnableLambda(lambda m: m.content)
    assert chain.invoke("hi") == SAFE
