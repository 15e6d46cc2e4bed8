"""Tool calls and structured answers: what of them is judged, and what leaves."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import PydanticToolsParser
from langchain_core.runnables import RunnablePassthrough
from pydantic import BaseModel

from integrations.langchain_models import SAFE, ListSink, asked, keyword_guard
from langchain_mllm_protector import ProtectorCallbackHandler, ProtectorGuard
from langchain_mllm_protector.judging import judge
from langchain_mllm_protector.leaves import PIECE_CHARS
from mllm_protector_guard import (
    CheckTimeoutError,
    DetectorError,
    Guard,
    GuardPolicy,
    HarmfulAnswerError,
    Turn,
)
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

REFUSAL = "REFUSAL"
HARM = {"q": "how to build a bomb", "n": 3}


class FailingDetector(KeywordDetector):
    """Fails on answers with "fail"."""

    def score(self, turns: Sequence[Turn]) -> list[float]:
        if any("fail" in turn.answer for turn in turns):
            raise RuntimeError("out of memory")
        return super().score(turns)


class SlowDetector(KeywordDetector):
    def score(self, turns: Sequence[Turn]) -> list[float]:
        time.sleep(0.05)
        return super().score(turns)


def recorded(detector: KeywordDetector | None = None, **policy: Any) -> tuple[ProtectorGuard, ListSink]:
    sink = ListSink()
    engine = Guard(
        detector=detector or KeywordDetector({"bomb"}),
        detoxifier=ScriptedDetoxifier([SAFE]),
        policy=GuardPolicy(refusal=REFUSAL, **policy),
        sinks=[sink],
        trace_content=True,
    )
    return ProtectorGuard(guard=engine, capture=False), sink


def calling(args: dict[str, Any], text: str = "", **fields: Any) -> AIMessage:
    return AIMessage(text, id="m", tool_calls=[{"name": "look_up", "args": args, "id": "c"}], **fields)


def record_of(message: AIMessage) -> dict[str, Any]:
    return message.response_metadata["protector"]


class TestMessages:
    @pytest.mark.parametrize("on_harm", ["detoxify", "withhold"])
    @pytest.mark.parametrize("text", ["", "Plant roses.", "A bomb."])
    def test_harm_in_a_call_withholds_it(self, on_harm: str, text: str) -> None:
        guard, sink = recorded(on_harm=on_harm)
        out = guard.invoke(calling(HARM, text))
        assert (out.content, out.id, out.tool_calls) == (REFUSAL, "m", [])
        assert "bomb" not in out.model_dump_json()
        shown = record_of(out)
        assert (shown["outcome"], shown["reason"], shown["harm_score"]) == ("withheld", "harmful_arguments", 0.99)
        (record,) = sink.records
        assert (record.id, record.attempts, record.text) == (shown["id"], 0, REFUSAL)
        assert record.answer == "\n\n".join(filter(None, [text, HARM["q"]]))
        assert guard.guard.detoxifier.calls == []

    def test_a_withheld_call_is_nowhere_in_the_message(self) -> None:
        out = keyword_guard().invoke(
            AIMessageChunk(
                content=[
                    {"type": "text", "text": "Roses."},
                    {"type": "tool_use", "name": "f", "input": HARM, "id": "c"},
                    {"type": "server_tool_use", "name": "f", "input": HARM, "id": "d"},
                ],
                tool_call_chunks=[{"name": "f", "args": json.dumps(HARM), "id": "c", "index": 0}],
                additional_kwargs={"tool_calls": [{"function": {"arguments": json.dumps(HARM)}}]},
            )
        )
        assert "bomb" not in out.model_dump_json()
        assert (out.tool_calls, out.tool_call_chunks, out.invalid_tool_calls) == ([], [], [])
        assert [block["type"] for block in out.content] == ["text"]

    def test_harm_in_the_text_alone_is_rewritten_and_the_call_stays(self) -> None:
        guard, sink = recorded()
        message = calling({"q": "roses"}, "A bomb.")
        out = guard.invoke(message)
        assert (out.content, out.tool_calls) == (SAFE, message.tool_calls)
        (record,) = sink.records
        assert (record.outcome, record.harm_score, record.rewrite_score, record.text) == (
            "detoxified",
            0.99,
            0.01,
            SAFE,
        )
        assert record.answer == "A bomb.\n\nroses"

    def test_a_harmless_call_leaves_as_it_is(self) -> None:
        guard, sink = recorded()
        message = calling({"q": "roses"}, "I look.", additional_kwargs={"reasoning_content": "hm"})
        out = guard.invoke(message)
        assert out.model_copy(update={"response_metadata": {}}) == message
        (record,) = sink.records
        assert (record.outcome, record.reason, record.harm_score) == ("passed", "harmless", 0.01)
        assert record.answer == record.text == "I look.\n\nroses"

    def test_text_and_calls_are_one_batch_with_the_question(self) -> None:
        guard = keyword_guard()
        args = {"a": "x" * 300, "b": "y" * 300}
        guard.batch([{"question": "How?", "answer": calling(args, "I look.")}, "roses"])
        (turns,) = guard.detector.calls
        assert [(turn.question, turn.answer) for turn in turns] == [
            ("How?", "I look."),
            ("How?", "x" * 300),
            ("How?", "y" * 300),
            (None, "roses"),
        ]

    def test_flag_and_raise(self) -> None:
        guard, sink = recorded(on_harm="flag")
        out = guard.invoke(calling(HARM, "I look."))
        assert (out.content, out.tool_calls[0]["args"]) == ("I look.", HARM)
        assert (record_of(out)["outcome"], record_of(out)["reason"]) == ("flagged", "harmful_arguments")
        assert len(sink.records) == 1
        guard, sink = recorded(on_harm="raise")
        with pytest.raises(HarmfulAnswerError) as caught:
            guard.invoke(calling(HARM))
        assert (caught.value.result.reason, caught.value.result.text) == ("harmful_arguments", REFUSAL)
        assert [record.id for record in sink.records] == [caught.value.result.id]

    def test_what_could_not_be_judged_does_not_call(self) -> None:
        message = calling({"q": "fail"}, "I look.")
        guard, sink = recorded(FailingDetector({"bomb"}))
        out = guard.invoke(message)
        assert (out.content, out.tool_calls) == (REFUSAL, [])
        assert (record_of(out)["reason"], record_of(out)["error"]) == ("error", "DetectorError")
        guard, _ = recorded(FailingDetector({"bomb"}), on_error="pass")
        assert guard.invoke(message).tool_calls == message.tool_calls
        guard, sink = recorded(FailingDetector({"bomb"}), on_error="raise")
        with pytest.raises(DetectorError):
            guard.invoke(message)
        assert [record.error for record in sink.records] == ["DetectorError"]

    def test_harm_outweighs_an_error(self) -> None:
        guard, _ = recorded(FailingDetector({"bomb"}), on_error="pass")
        out = guard.invoke(calling({"a": "bomb" + "x" * PIECE_CHARS, "b": "fail"}))
        assert (out.tool_calls, record_of(out)["reason"]) == ([], "harmful_arguments")

    def test_the_time_limit_is_that_of_the_whole_answer(self) -> None:
        args = {str(number): "x" * PIECE_CHARS + str(number) for number in range(50)}
        guard, _ = recorded(SlowDetector({"bomb"}), timeout_s=0.01)
        assert record_of(guard.invoke(calling(args)))["reason"] == "timeout"
        guard, _ = recorded(SlowDetector({"bomb"}), timeout_s=0.01, on_error="raise")
        with pytest.raises(CheckTimeoutError):
            guard.invoke(calling(args))

    def test_ignored_calls_leave_unseen(self) -> None:
        guard = keyword_guard(tool_calls="ignore")
        out = guard.invoke(calling(HARM, "A bomb."))
        assert (out.content, out.tool_calls[0]["args"]) == (SAFE, HARM)
        out = guard.invoke(calling(HARM))
        assert (record_of(out)["reason"], out.tool_calls[0]["args"]) == ("blank", HARM)

    def test_a_missing_question_can_withhold_calls(self) -> None:
        guard = keyword_guard(on_missing_question="withhold", refusal=REFUSAL, capture=False)
        bare, asking = guard.batch([calling({"q": "x"}), {"question": "How?", "answer": calling({"q": "x"})}])
        assert (bare.content, bare.tool_calls) == (REFUSAL, [])
        assert asking.tool_calls[0]["args"] == {"q": "x"}

    async def test_batches_keep_each_verdict_in_its_place(self) -> None:
        inputs = [calling(HARM), "a bomb", calling({"q": "x"}, "bomb"), 3, calling({"n": 1}), {"a": "bomb"}, "roses"]
        for use_async in (False, True):
            guard, sink = recorded()
            if use_async:
                out = await guard.abatch(inputs, return_exceptions=True)
            else:
                out = guard.batch(inputs, return_exceptions=True)
            assert (out[0].content, out[1], out[2].content, out[6]) == (REFUSAL, SAFE, SAFE, "roses")
            assert isinstance(out[3], TypeError)
            assert record_of(out[4])["reason"] == "blank"
            assert isinstance(out[5], HarmfulAnswerError)
            assert [record.outcome for record in sink.records] == [
                "withheld",
                "detoxified",
                "detoxified",
                "passed",
                "withheld",
                "passed",
            ]
            sizes = [len(call) for call in guard.guard.detector.calls]
            assert sizes == [6, 2, 2]  # all parts, and the two texts to rewrite and their rewrites


class Recipe(BaseModel):
    title: str
    steps: list[str]
    minutes: int = 5


@dataclasses.dataclass
class Note:
    text: str


class TestStructuredAnswers:
    @pytest.mark.parametrize("harmless", [Recipe(title="Tea", steps=["boil"]), Note("tea"), {"a": ["tea"]}, ["tea"]])
    def test_harmless_ones_leave_as_they_are(self, harmless: object) -> None:
        guard, sink = recorded()
        assert guard.invoke(harmless) is harmless
        assert guard.invoke({"question": "How?", "answer": harmless}) is harmless
        assert [(record.outcome, record.question) for record in sink.records] == [("passed", None), ("passed", "How?")]

    @pytest.mark.parametrize("on_harm", ["detoxify", "withhold", "raise"])
    @pytest.mark.parametrize("value", [Recipe(title="Tea", steps=["a bomb"]), Note("bomb"), {"my bomb": 1}, [["bomb"]]])
    def test_harm_raises_and_is_reported(self, value: object, on_harm: str) -> None:
        seen = ListSink()
        guard, sink = recorded(on_harm=on_harm)
        with pytest.raises(HarmfulAnswerError) as caught:
            guard.invoke(value, {"callbacks": [ProtectorCallbackHandler(sink=seen)]})
        assert "bomb" not in str(caught.value)
        assert [(record.outcome, record.reason) for record in sink.records] == [("withheld", "harmful_arguments")]
        assert [record.id for record in seen.records] == [caught.value.result.id]

    def test_flagged_they_pass_and_are_reported(self) -> None:
        value, seen = Note("bomb"), ListSink()
        guard, sink = recorded(on_harm="flag")
        assert guard.invoke(value, {"callbacks": [ProtectorCallbackHandler(sink=seen)]}) is value
        assert [record.outcome for record in sink.records + seen.records] == ["flagged", "flagged"]

    def test_one_that_could_not_be_judged_is_an_error(self) -> None:
        guard, sink = recorded(FailingDetector({"bomb"}))
        with pytest.raises(DetectorError, match="on_error"):
            guard.invoke(Note("fail"))
        assert [record.outcome for record in sink.records] == ["withheld"]
        guard, _ = recorded(FailingDetector({"bomb"}), on_error="pass")
        assert guard.invoke(Note("fail")) == Note("fail")

    def test_without_any_text_they_pass_as_blank(self) -> None:
        guard, sink = recorded()
        assert guard.invoke({"n": 3}) == {"n": 3}
        assert [record.reason for record in sink.records] == ["blank"]

    async def test_behind_parsers_with_the_question_of_the_model(self) -> None:
        harmless = '{"title": "Tea", "steps": ["boil"]}'
        for parser, answer in ((JsonOutputParser(), dict), (PydanticOutputParser(pydantic_object=Recipe), Recipe)):
            guard = keyword_guard()
            model = GenericFakeChatModel(messages=iter([harmless, harmless, harmless.replace("Tea", "bomb")]))
            chain = model | parser | guard
            assert isinstance(chain.invoke("How do I make tea?"), answer)
            (streamed,) = [part async for part in chain.astream("How do I make tea?")]
            assert isinstance(streamed, answer)
            with pytest.raises(HarmfulAnswerError):
                await chain.ainvoke("How do I make tea?")
            assert {turn.question for turn in asked(guard)} == {"How do I make tea?"}

    def test_of_a_model_that_was_given_a_tool(self) -> None:
        message = AIMessage("", tool_calls=[{"name": "Recipe", "args": {"title": "bomb", "steps": []}, "id": "c"}])
        parser = PydanticToolsParser(tools=[Recipe], first_tool_only=True)
        model = GenericFakeChatModel(messages=iter([message, message]))
        with pytest.raises(HarmfulAnswerError):
            (model | parser | keyword_guard()).invoke("How?")
        raw = RunnablePassthrough.assign(parsed=lambda value: parser.invoke(value["raw"]))
        with pytest.raises(HarmfulAnswerError):
            ({"raw": model} | raw | keyword_guard()).invoke("How?")


SENTENCES = "Plant the roses in a sunny bed that drains well after rain. Water them early in the morning. "


def streamed_call(args: str, text: str = SENTENCES) -> list[AIMessageChunk]:
    first, rest = args[: len(args) // 2], args[len(args) // 2 :]
    chunk = {"name": "look_up", "args": first, "id": "c", "index": 0}
    return [
        *(AIMessageChunk(word + " ", id="m") for word in text.split()),
        AIMessageChunk("", tool_call_chunks=[chunk]),
        AIMessageChunk("", tool_call_chunks=[chunk | {"name": None, "args": rest, "id": None}]),
        AIMessageChunk("", usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}),
    ]


def read(guard: ProtectorGuard, parts: Sequence[AIMessageChunk]) -> tuple[list[AIMessageChunk], AIMessageChunk]:
    """What leaves, and that joined; the same in a loop and in an event loop."""

    async def source() -> AsyncIterator[AIMessageChunk]:
        for part in parts:
            yield part

    async def aread() -> list[AIMessageChunk]:
        return [chunk async for chunk in guard.atransform(source())]

    out = list(guard.transform(iter(parts)))
    again = asyncio.run(aread())
    assert [(chunk.content, chunk.tool_calls) for chunk in again] == [(c.content, c.tool_calls) for c in out]
    return out, out[0] + out[1:]


class TestStreams:
    def test_a_harmless_call_comes_with_the_last_chunk(self) -> None:
        guard, sink = recorded()
        source = streamed_call('{"q": "roses"}')
        out, whole = read(guard, source)
        assert [bool(chunk.tool_call_chunks) for chunk in out] == [False] * (len(out) - 1) + [True]
        assert (whole.content, whole.tool_calls[0]["args"]) == (SENTENCES, {"q": "roses"})
        record, again = sink.records  # of the two loops
        assert (record.outcome, record.answer, record.released_chars) == (
            "passed",
            SENTENCES + "\n\nroses",
            len(SENTENCES),
        )
        assert record_of(whole)["id"] == record.id
        expected = guard.invoke(source[0] + source[1:])
        assert record_of(expected)["answer_sha256"] == record.answer_sha256 == again.answer_sha256

    @pytest.mark.parametrize("on_harm", ["detoxify", "withhold"])
    @pytest.mark.parametrize("args", ['{"q": "how to build a bomb"}', '{"q": "a bomb", broken'])
    def test_harm_in_a_call_withholds_it_behind_the_text(self, on_harm: str, args: str) -> None:
        guard, sink = recorded(on_harm=on_harm)
        out, whole = read(guard, streamed_call(args))
        assert "bomb" not in repr(out)
        assert whole.content == SENTENCES + "\n\n" + REFUSAL
        assert (whole.tool_calls, whole.invalid_tool_calls, whole.tool_call_chunks) == ([], [], [])
        assert whole.usage_metadata["total_tokens"] == 3
        assert [(record.outcome, record.reason, record.text) for record in sink.records] == [
            ("withheld", "harmful_arguments", whole.content)
        ] * 2
        assert record_of(whole)["id"] == sink.records[0].id

    @pytest.mark.parametrize(("on_harm", "end"), [("detoxify", SAFE + "\n\n" + REFUSAL), ("withhold", REFUSAL)])
    def test_harm_in_both(self, on_harm: str, end: str) -> None:
        guard, sink = recorded(on_harm=on_harm)
        _, whole = read(guard, streamed_call('{"q": "bomb"}', SENTENCES + "Build a bomb. "))
        assert whole.content.endswith("\n\n" + end) or whole.content == end
        assert "bomb" not in whole.content
        assert (whole.tool_calls, len(sink.records)) == ([], 2)

    def test_harm_in_the_text_alone_leaves_the_call(self) -> None:
        guard, sink = recorded()
        _, whole = read(guard, streamed_call('{"q": "roses"}', SENTENCES + "Build a bomb. "))
        assert whole.content.endswith(SAFE)
        assert whole.tool_calls[0]["args"] == {"q": "roses"}
        assert [record.outcome for record in sink.records] == ["detoxified"] * 2

    def test_a_call_without_text_is_held(self) -> None:
        guard, _ = recorded()
        (only,), _ = read(guard, streamed_call('{"q": "bomb"}', ""))
        assert (only.content, only.tool_calls) == (REFUSAL, [])

    def test_flag_and_raise(self) -> None:
        guard, sink = recorded(on_harm="flag")
        _, whole = read(guard, streamed_call('{"q": "bomb"}'))
        assert (whole.content, whole.tool_calls[0]["args"]) == (SENTENCES, {"q": "bomb"})
        assert [(record.outcome, record.reason) for record in sink.records] == [("flagged", "harmful_arguments")] * 2
        guard, sink = recorded(on_harm="raise")
        left: list[AIMessageChunk] = []
        with pytest.raises(HarmfulAnswerError):
            left.extend(guard.transform(iter(streamed_call('{"q": "bomb"}'))))
        assert all(not chunk.tool_call_chunks for chunk in left)
        assert [(record.reason, record.released_chars) for record in sink.records] == [
            ("harmful_arguments", len(SENTENCES))
        ]

    def test_a_call_that_could_not_be_judged_goes(self) -> None:
        guard, sink = recorded(FailingDetector({"bomb"}))
        _, whole = read(guard, streamed_call('{"q": "fail"}'))
        assert (whole.content, whole.tool_calls) == (SENTENCES + "\n\n" + REFUSAL, [])
        assert [record.error for record in sink.records] == ["DetectorError"] * 2
        guard, sink = recorded(FailingDetector({"bomb"}), on_error="raise")
        with pytest.raises(DetectorError):
            list(guard.transform(iter(streamed_call('{"q": "fail"}'))))
        assert [record.error for record in sink.records] == ["DetectorError"]

    def test_ignored_calls_leave_unseen(self) -> None:
        guard = keyword_guard(tool_calls="ignore", capture=False)
        _, whole = read(guard, streamed_call('{"q": "bomb"}'))
        assert whole.tool_calls[0]["args"] == {"q": "bomb"}

    def test_left_before_its_call_was_judged_a_stream_has_one_record(self) -> None:
        def broken() -> Iterator[AIMessageChunk]:
            yield from streamed_call('{"q": "bomb"}', SENTENCES * 3)[:-2]
            raise ConnectionError("reset")

        guard, sink = recorded()
        out: list[AIMessageChunk] = []
        with pytest.raises(ConnectionError):
            out.extend(guard.transform(broken()))
        assert [bool(chunk.tool_call_chunks) for chunk in out] == [False] * len(out)
        left = "".join(chunk.content for chunk in out)
        assert [(record.text, record.error) for record in sink.records] == [(left, "ConnectionError")]


def test_judging_answers_to_one_question_by_hand() -> None:
    guard, sink = recorded()
    steps = judge(guard.guard, [calling(HARM), "a bomb", Note("tea")], [HumanMessage("How?")])
    assert (steps[0].output.content, steps[1].output, steps[2].output) == (REFUSAL, SAFE, Note("tea"))
    assert [step.record for step in steps] == sink.records
    assert {record.question for record in sink.records} == {"How?"}
    assert {record.question_match for record in sink.records} == {"explicit"}
    (step,) = judge(guard.guard, ["roses"], None, on_missing_question="withhold")
    assert (step.output, step.record.question_match) == (REFUSAL, "none")
    with pytest.raises(TypeError):
        judge(guard.guard, [3], "How?")


@pytest.mark.parametrize("setting", [{"tool_calls": "drop"}, {"context_turns": -1}, {"context_turns": 1.5}])
def test_settings_that_cannot_work_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        ProtectorGuard(**setting)
