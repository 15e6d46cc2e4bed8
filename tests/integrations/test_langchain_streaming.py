"""Streams that are guarded while they come in: what leaves, when, in which chunks, and what is on record."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableGenerator, RunnablePassthrough

from integrations.langchain_models import SAFE, EchoModel, ListSink, asked, keyword_guard
from langchain_mllm_protector import ProtectorCallbackHandler, ProtectorGuard, capture
from mllm_protector_guard import ConfigError, DetectorError, Guard, GuardPolicy, HarmfulAnswerError, Turn
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

HAS_POSITION = "chunk_position" in AIMessageChunk.model_fields
REFUSAL = "REFUSAL"
# Each sentence is long enough to be judged alone, and two of them are more than the look-ahead.
SENTENCES = [
    "Plant the roses in a sunny bed that drains well after rain. ",
    "Water them early in the morning, and never on the leaves. ",
    "Feed them twice a year with compost from the old heap there. ",
    "Cut them back in March, above a bud that points outwards. ",
    "Tie the long shoots of climbers flat along the wires there. ",
    "Pick the faded flowers off all summer, so that more come on. ",
]
HARM = "Then build a bomb, which is what this sentence is about here. "
HARMLESS = "".join(SENTENCES)
HARMFUL = "".join(SENTENCES[:4]) + HARM + HARMLESS
BEFORE = "".join(SENTENCES[:2])
"""What left of `HARMFUL` when its fifth sentence is judged: the look-ahead holds two sentences."""

REASONING = {"type": "reasoning", "reasoning": "how about a bomb", "index": 0}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


class FailingDetector(KeywordDetector):
    """Fails on answers with "Feed"."""

    def score(self, turns: Sequence[Turn]) -> list[float]:
        if any("Feed" in turn.answer for turn in turns):
            raise RuntimeError("out of memory")
        return super().score(turns)


def recorded(detector: KeywordDetector | None = None, **policy: Any) -> tuple[ProtectorGuard, ListSink]:
    """A guard that answers to no question, and what its one sink keeps."""
    sink = ListSink()
    engine = Guard(
        detector=detector or KeywordDetector({"bomb"}),
        detoxifier=ScriptedDetoxifier([SAFE]),
        policy=GuardPolicy(refusal=REFUSAL, **policy),
        sinks=[sink],
        trace_content=True,
    )
    return ProtectorGuard(guard=engine, capture=False), sink


def words(text: str, size: int = 7) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def chunks_of(texts: Sequence[str], *, blocks: bool = False) -> list[AIMessageChunk]:
    """As a provider streams an answer: text, a tool call in two parts, and usage at the end."""
    last = {"chunk_position": "last"} if HAS_POSITION else {}
    call = {"name": "water", "args": '{"ml"', "id": "c", "index": 0}
    return [
        AIMessageChunk(content=[] if blocks else "", id="lc_run--1", response_metadata={"model_name": "m"}),
        *(
            AIMessageChunk(content=[{"type": "text", "text": text, "index": 0}] if blocks else text, id="lc_run--1")
            for text in texts
        ),
        AIMessageChunk(content="", id="msg-1", tool_call_chunks=[call]),
        AIMessageChunk(content="", tool_call_chunks=[call | {"name": None, "args": ": 5}", "id": None}]),
        AIMessageChunk(
            content="",
            id="msg-1",
            usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
            response_metadata={"finish_reason": "stop", "temperature": 0.5},
            **last,
        ),
    ]


def join(chunks: Sequence[AIMessageChunk]) -> AIMessageChunk:
    return chunks[0] + list(chunks[1:])


def read(guard: ProtectorGuard, parts: Sequence[Any], config: Any = None) -> list[Any]:
    """What leaves, the same in a loop and in an event loop."""
    out = list(guard.transform(iter(parts), config))

    async def source() -> AsyncIterator[Any]:
        for part in parts:
            await asyncio.sleep(0)
            yield part

    async def aread() -> list[Any]:
        return [chunk async for chunk in guard.atransform(source(), config)]

    again = asyncio.run(aread())
    assert [getattr(chunk, "content", chunk) for chunk in again] == [getattr(chunk, "content", chunk) for chunk in out]
    return out


def read_until_error(chunks: Iterator[Any], kind: type[Exception]) -> list[Any]:
    out: list[Any] = []
    with pytest.raises(kind):
        out.extend(chunks)
    return out


class TestHarmless:
    @pytest.mark.parametrize("blocks", [False, True])
    @pytest.mark.parametrize("stream", ["sentence", "whole", 2])
    @settings(max_examples=15)
    @given(data=st.data())
    def test_any_chunking_joins_to_what_invoke_gives(self, stream: Any, blocks: bool, data: st.DataObject) -> None:
        cuts = sorted(data.draw(st.sets(st.integers(1, len(HARMLESS) - 1), max_size=12)))
        texts = [HARMLESS[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(HARMLESS)], strict=True)]
        source = chunks_of(texts, blocks=blocks)
        guard = keyword_guard(stream=stream, capture=False)
        streamed = join(list(guard.transform(iter(source))))
        whole = guard.invoke(join(source))
        record, expected = (message.response_metadata.pop("protector") for message in (streamed, whole))
        assert streamed.model_dump() == whole.model_dump()
        for name in ("outcome", "harm_score", "answer_sha256", "text_sha256"):
            assert record[name] == expected[name]

    def test_text_leaves_while_the_model_still_writes(self) -> None:
        written: list[str] = []

        def model() -> Iterator[str]:
            for text in SENTENCES:
                written.append(text)
                yield text

        stream = keyword_guard(capture=False).transform(model())
        assert next(stream) == SENTENCES[0]
        assert written == SENTENCES[:4]
        stream = keyword_guard(capture=False).transform(iter(words(HARMFUL, 1)))
        assert next(stream) == SENTENCES[0]

    def test_only_the_last_chunk_holds_more_than_text(self) -> None:
        *texts, last = read(keyword_guard(capture=False), chunks_of(words(HARMLESS)))
        assert [chunk.content for chunk in texts] == SENTENCES[:3]
        for chunk in texts:
            assert chunk == AIMessageChunk(content=chunk.content, id="lc_run--1")
        assert last.content == "".join(SENTENCES[3:])
        assert last.tool_calls[0]["args"] == {"ml": 5}
        assert last.usage_metadata["total_tokens"] == 3
        assert last.response_metadata["protector"]["released_chars"] == len(HARMLESS)

    def test_text_is_str_in_str_out(self) -> None:
        out = read(keyword_guard(capture=False), words(HARMLESS))
        assert out == [*SENTENCES[:3], "".join(SENTENCES[3:])]

    def test_blank_answers_and_tool_calls_alone_pass(self) -> None:
        (only,) = read(keyword_guard(capture=False), chunks_of([]))
        assert (only.content, only.tool_calls[0]["name"]) == ("", "water")
        assert only.response_metadata["protector"]["reason"] == "blank"

    def test_a_number_judges_after_so_many_tokens(self) -> None:
        guard = keyword_guard(capture=False, stream=25)
        assert "".join(read(guard, words("so it goes on " * 60))) == "so it goes on " * 60
        sizes = [len(turn.answer) for turn in asked(guard)]
        assert sizes[0] <= 100 + 7
        assert len(sizes) > 2 * 6  # of both loops


class TestMoreThanText:
    def texts(self) -> list[AIMessageChunk]:
        return [AIMessageChunk(content=[{"type": "text", "text": text, "index": 1}]) for text in words(HARMFUL[:300])]

    def test_behind_it_the_rest_is_held_in_its_order(self) -> None:
        harmless = [chunk for chunk in self.texts() if "bomb" not in chunk.content[0]["text"]][:30]
        source = [*harmless, AIMessageChunk(content=[IMAGE]), AIMessageChunk(content="And rest.")]
        out = read(keyword_guard(capture=False), source)
        assert len(out) > 1
        assert join(out).content == join(source).content
        assert [block.get("type") for block in out[-1].content[:2]] == ["text", "image_url"]
        assert all("image_url" not in repr(chunk.content) for chunk in out[:-1])

    def test_before_the_text_all_is_held_and_dropped_with_harm(self) -> None:
        source = [AIMessageChunk(content=[REASONING]), *self.texts(), AIMessageChunk(content=[IMAGE])]
        (only,) = read(keyword_guard(capture=False), source)
        assert only.content == [{"type": "text", "text": SAFE, "index": 1}, IMAGE]

    def test_harm_in_what_was_held_is_caught(self) -> None:
        source = [*chunks_of(words(HARMLESS), blocks=True)[:-3], AIMessageChunk(content=[{"text": HARM}])]
        out = read(keyword_guard(capture=False, on_harm="withhold", refusal=REFUSAL), source)
        text = "".join(block["text"] for block in join(out).content)
        assert text == "".join(SENTENCES[:4]) + "\n\n" + REFUSAL

    def test_side_fields_of_a_harmful_answer_hold_no_text(self) -> None:
        source = [
            AIMessageChunk(content=text, additional_kwargs={"reasoning_content": "a bomb "}) for text in words(HARMFUL)
        ]
        assert "bomb" not in repr(read(keyword_guard(capture=False), source))


class TestHarmful:
    @pytest.mark.parametrize("blocks", [False, True])
    @pytest.mark.parametrize(("on_harm", "end"), [("detoxify", SAFE), ("withhold", REFUSAL)])
    def test_the_replacement_follows_on_a_paragraph_of_its_own(self, on_harm: str, end: str, blocks: bool) -> None:
        guard, sink = recorded(on_harm=on_harm)
        source = chunks_of(words(HARMFUL), blocks=blocks)
        out = read(guard, source)
        streamed, text = join(out), BEFORE + "\n\n" + end
        assert streamed.content == ([{"type": "text", "text": text, "index": 0}] if blocks else text)
        for name in ("id", "tool_calls", "usage_metadata"):
            assert getattr(streamed, name) == getattr(join(source), name)
        if HAS_POSITION:
            assert [chunk.chunk_position for chunk in out] == [None] * (len(out) - 1) + ["last"]
        record, again = sink.records  # of the two loops
        assert (record.text, record.released_chars, again.text) == (text, len(BEFORE), text)
        shown = streamed.response_metadata.pop("protector")
        assert (shown["id"], shown["outcome"]) == (record.id, record.outcome)
        assert (shown["answer"], shown["text"]) == (None, None)
        assert streamed.response_metadata == join(source).response_metadata

    @pytest.mark.parametrize(("on_harm", "end"), [("detoxify", SAFE), ("withhold", REFUSAL)])
    def test_text_too(self, on_harm: str, end: str) -> None:
        guard, sink = recorded(on_harm=on_harm)
        assert "".join(read(guard, words(HARMFUL))) == BEFORE + "\n\n" + end
        assert [record.text for record in sink.records] == [BEFORE + "\n\n" + end] * 2

    def test_a_refusal_does_not_wait_for_the_rest_of_the_answer(self) -> None:
        written: list[str] = []

        def model() -> Iterator[AIMessageChunk]:
            for chunk in chunks_of(words(HARMFUL)):
                written.append(chunk.content)
                yield chunk

        guard, _ = recorded(on_harm="withhold")
        stream = guard.transform(model())
        while REFUSAL not in next(stream).content:
            pass
        assert len(written) < len(words(HARMFUL)) - 10
        assert next(stream).usage_metadata["total_tokens"] == 3

    def test_flag_lets_all_through_and_marks_it(self) -> None:
        guard, sink = recorded(on_harm="flag")
        streamed = join(read(guard, chunks_of(words(HARMFUL))))
        assert streamed.content == HARMFUL
        assert streamed.response_metadata["protector"]["outcome"] == "flagged"
        assert len(sink.records) == 2

    def test_raise_raises_behind_what_had_left(self) -> None:
        guard, sink = recorded(on_harm="raise")
        out = read_until_error(guard.transform(iter(chunks_of(words(HARMFUL)))), HarmfulAnswerError)
        assert join(out).content == BEFORE
        assert [record.released_chars for record in sink.records] == [len(BEFORE)]

    @pytest.mark.parametrize("on_error", ["withhold", "raise", "pass"])
    def test_a_verdict_that_fails(self, on_error: Any) -> None:
        guard, sink = recorded(FailingDetector({"bomb"}), on_error=on_error)
        stream = guard.transform(iter(words(HARMLESS)))
        out = read_until_error(stream, DetectorError) if on_error == "raise" else list(stream)
        text = "".join(out)
        if on_error == "pass":
            assert text == HARMLESS
        else:
            assert "Feed" not in text
            assert text.endswith(REFUSAL) == (on_error == "withhold")
        assert [record.error for record in sink.records] == ["DetectorError"]


class TestQuestion:
    async def test_of_the_model_before_the_answer_has_ended(self) -> None:
        model = FakeListChatModel(responses=[HARMLESS])
        for chain in (model, model | StrOutputParser()):
            guard = keyword_guard()
            out = list((chain | guard).stream("How do roses grow?"))
            out += [chunk async for chunk in (chain | guard).astream("How do roses grow?")]
            assert len(out) >= 6
            assert {turn.question for turn in asked(guard)} == {"How do roses grow?"}

    def test_of_the_later_of_two_models(self) -> None:
        guard = keyword_guard()
        chain = EchoModel(label="and") | StrOutputParser() | FakeListChatModel(responses=[HARMLESS])
        assert len(list((chain | StrOutputParser() | guard).stream("roses"))) >= 3
        assert {turn.question for turn in asked(guard)} == {"and roses "}

    def test_given_per_call(self) -> None:
        guard = keyword_guard()
        out = list(guard.transform(iter(words(HARMLESS)), {"configurable": {"__protector_question": "mine"}}))
        assert len(out) >= 3
        assert {turn.question for turn in asked(guard)} == {"mine"}

    def test_that_is_not_sure_yet_holds_the_answer(self) -> None:
        guard = keyword_guard()

        def two_models(_: Iterator[Any]) -> Iterator[str]:
            first = FakeListChatModel(responses=[HARMLESS]).stream("the first")
            second = FakeListChatModel(responses=["No."]).stream("the second")
            next(second)
            for chunk in first:
                yield chunk.content
            list(second)

        assert list((RunnableGenerator(two_models) | guard).stream("q")) == [HARMLESS]
        assert [(turn.question, turn.answer) for turn in asked(guard)] == [("the first", HARMLESS)]

    def test_of_a_dict_holds_the_answer(self) -> None:
        guard = keyword_guard()
        chain = {"question": RunnablePassthrough(), "answer": FakeListChatModel(responses=[HARMLESS])} | guard
        (only,) = chain.stream("How?")
        assert only.content == HARMLESS
        assert [turn.question for turn in asked(guard)] == ["How?"]

    def test_that_is_missing_is_decided_on_as_for_whole_answers(self, caplog: pytest.LogCaptureFixture) -> None:
        parts = words(HARMLESS)
        withholding = keyword_guard(capture=False, on_missing_question="withhold", refusal=REFUSAL)
        assert list(withholding.transform(iter(parts))) == [REFUSAL]
        with pytest.raises(DetectorError):
            list(keyword_guard(capture=False, on_missing_question="raise").transform(iter(parts)))
        warning = keyword_guard(capture=False, on_missing_question="warn")
        assert "".join(warning.transform(iter(parts))) == HARMLESS
        assert "without its question" in caplog.text


class TestBreakingOff:
    def test_an_early_close_closes_the_source_and_is_on_record(self) -> None:
        closed, seen = [], ListSink()

        def model() -> Iterator[str]:
            try:
                yield from words(HARMFUL)
            finally:
                closed.append(True)

        source = model()
        guard, sink = recorded()
        stream = guard.transform(source, {"callbacks": [ProtectorCallbackHandler(sink=seen)]})
        assert next(stream) == SENTENCES[0]
        stream.close()
        assert closed == [True]
        assert [(record.text, record.error) for record in sink.records] == [(SENTENCES[0], "GeneratorExit")]
        assert seen.records == sink.records

    async def test_an_early_aclose_does_too(self) -> None:
        closed, seen = [], ListSink()

        async def model() -> AsyncIterator[str]:
            try:
                for word in words(HARMFUL):
                    yield word
            finally:
                closed.append(True)

        source = model()
        guard, sink = recorded()
        stream = guard.atransform(source, {"callbacks": [ProtectorCallbackHandler(sink=seen)]})
        assert await anext(stream) == SENTENCES[0]
        await stream.aclose()
        assert closed == [True]
        assert [record.text for record in sink.records] == [SENTENCES[0]]
        assert seen.records == sink.records

    async def test_a_chain_that_is_left_early_leaves_nothing_behind(self) -> None:
        before = capture.CAPTURE.open_runs
        chain = FakeListChatModel(responses=[HARMLESS]) | keyword_guard()
        stream = chain.stream("q")
        next(stream)
        stream.close()
        astream = chain.astream("q")
        await anext(astream)
        await astream.aclose()
        del stream, astream
        gc.collect()
        async with asyncio.timeout(60):  # the event loop closes the generators one after the other
            while capture.CAPTURE.open_runs != before:
                await asyncio.sleep(0.01)

    async def test_a_cancelled_reader(self) -> None:
        guard, sink = recorded()
        got: list[str] = []
        closed: list[bool] = []
        waiting = asyncio.Event()

        async def model() -> AsyncIterator[str]:
            try:
                for word in words(HARMLESS):
                    yield word
                waiting.set()
                await asyncio.sleep(60)
            finally:
                closed.append(True)

        async def reader() -> None:
            async for text in guard.atransform(model()):
                got.append(text)

        task = asyncio.create_task(reader())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [True]
        assert [(record.text, record.error) for record in sink.records] == [("".join(got), "CancelledError")]

    def test_an_error_of_the_source_comes_through(self) -> None:
        def broken() -> Iterator[AIMessageChunk]:
            yield from chunks_of(words(HARMLESS))[:-3]
            raise ConnectionError("reset")

        guard, sink = recorded()
        out = read_until_error(guard.transform(broken()), ConnectionError)
        left = "".join(SENTENCES[:3])
        assert join(out).content == left
        assert [(record.text, record.error) for record in sink.records] == [(left, "ConnectionError")]

    @pytest.mark.parametrize("other", [3, AIMessage("roses"), AIMessageChunk(content="roses")])
    def test_parts_of_another_kind_are_an_error(self, other: Any) -> None:
        with pytest.raises(TypeError, match="cannot join"):
            list(keyword_guard(capture=False).transform(iter([HARMLESS, other])))
        if not isinstance(other, AIMessageChunk):
            with pytest.raises(TypeError, match="cannot join"):
                list(keyword_guard(capture=False).transform(iter([AIMessageChunk(content=HARMLESS), other])))


async def test_astream_events_give_each_chunk_and_the_record_once() -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage(HARMFUL)]))
    chain = model | keyword_guard().with_config(run_name="guard")
    events = [event async for event in chain.astream_events("q", version="v2") if event["name"] == "guard"]
    chunks = [event["data"]["chunk"] for event in events if event["event"] == "on_parser_stream"]
    assert len(chunks) >= 3
    assert join(chunks).content == BEFORE + "\n\n" + SAFE
    (end,) = (event for event in events if event["event"] == "on_parser_end")
    assert end["data"]["output"].content == BEFORE + "\n\n" + SAFE
    assert ["protector" in chunk.response_metadata for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize("stream", ["words", 0, True, 1.5, 10**6])
def test_a_mode_that_is_none_is_refused(stream: Any) -> None:
    with pytest.raises(ConfigError, match="stream"):
        ProtectorGuard(stream=stream)


def test_the_mode_may_be_given_beside_a_guard_and_configured() -> None:
    engine = Guard(detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="withhold", refusal=REFUSAL))
    assert list(ProtectorGuard(guard=engine, stream="whole").transform(iter(words(HARMFUL)))) == [REFUSAL]
    assert ProtectorGuard().stream_mode == "sentence"
