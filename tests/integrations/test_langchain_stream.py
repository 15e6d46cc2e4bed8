"""Streams: held until the verdict, then sent on in a form that still joins."""

from collections.abc import AsyncIterator, Iterator

import pytest
from langchain_core.language_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableGenerator, RunnablePassthrough

from integrations.langchain_models import SAFE, DiaryDetector, EchoModel, asked, keyword_guard
from mllm_protector_guard import DEFAULT_REFUSAL

HAS_POSITION = "chunk_position" in AIMessageChunk.model_fields


def join(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    return chunks[0] + chunks[1:]


def chunks_of_a_real_stream() -> list[AIMessageChunk]:
    """As a provider sends them: text, a tool call in pieces, usage at the end."""
    last = {"chunk_position": "last"} if HAS_POSITION else {}
    return [
        AIMessageChunk(content="Plant ", id="run-1", response_metadata={"model_name": "m"}),
        AIMessageChunk(content="roses.", id="run-1"),
        AIMessageChunk(
            content="", id="run-1", tool_call_chunks=[{"name": "water", "args": '{"ml"', "id": "c", "index": 0}]
        ),
        AIMessageChunk(
            content="", id="run-1", tool_call_chunks=[{"name": None, "args": ": 5}", "id": None, "index": 0}]
        ),
        AIMessageChunk(
            content="",
            id="run-1",
            usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
            response_metadata={"finish_reason": "stop", "temperature": 0.5},
            **last,
        ),
    ]


@pytest.mark.parametrize("answer", ["answer to", "a bomb for"])
async def test_no_chunk_leaves_before_the_verdict(answer: str) -> None:
    for use_async in (False, True):
        diary: list[str] = []
        model = EchoModel(label=answer, on_chunk=diary.append)
        chain = model | keyword_guard(detector=DiaryDetector(diary), on_harm="withhold")
        if use_async:
            async for chunk in chain.astream("my roses"):
                diary.append("OUT:" + chunk.content)
        else:
            for chunk in chain.stream("my roses"):
                diary.append("OUT:" + chunk.content)
        words = [*answer.split(), "my", "roses"]
        out = DEFAULT_REFUSAL if "bomb" in answer else " ".join(words) + " "
        assert diary == [*words, "score", "OUT:" + out]


async def test_harm_across_chunks_is_caught() -> None:
    # This model streams letter by letter: no chunk alone is harmful.
    chain = FakeListChatModel(responses=["a bomb"]) | keyword_guard()
    assert [chunk.content for chunk in chain.stream("x")] == [SAFE]
    assert [chunk.content async for chunk in chain.astream("x")] == [SAFE]


async def test_stream_is_invoke() -> None:
    for label in ("answer to", "a bomb for"):
        chain = FakeListChatModel(responses=[f"{label} you"]) | keyword_guard()
        whole = chain.invoke("me")
        for chunks in (list(chain.stream("me")), [chunk async for chunk in chain.astream("me")]):
            streamed = join(chunks)
            assert isinstance(streamed, AIMessageChunk)
            assert streamed.content == whole.content
            for key in ("outcome", "harm_score", "question_sha256", "text_sha256", "question_match"):
                assert streamed.response_metadata["protector"][key] == whole.response_metadata["protector"][key]


@pytest.mark.parametrize("harmful", [False, True])
async def test_a_stream_keeps_calls_usage_and_position(harmful: bool) -> None:
    source = chunks_of_a_real_stream()
    if harmful:
        source[1].content = "a bomb."
    guard = keyword_guard()

    async def asource() -> AsyncIterator[AIMessageChunk]:
        for chunk in source:
            yield chunk

    sync_chunks = list(guard.transform(iter(source)))
    async_chunks = [chunk async for chunk in guard.atransform(asource())]
    for chunks in (sync_chunks, async_chunks):
        streamed, expected = join(chunks), join(source)
        assert streamed.content == (SAFE if harmful else expected.content)
        for name in ("id", "tool_calls", "tool_call_chunks", "usage_metadata"):
            assert getattr(streamed, name) == getattr(expected, name)
        if HAS_POSITION:
            assert streamed.chunk_position == "last"
        record = streamed.response_metadata.pop("protector")
        assert streamed.response_metadata == expected.response_metadata
        assert record["outcome"] == ("detoxified" if harmful else "passed")
        assert len(chunks) == 1  # so the record is there once


def test_block_streams_join_again() -> None:
    parts = [
        AIMessageChunk(content=[{"type": "thinking", "thinking": "how about a bomb", "index": 0}]),
        AIMessageChunk(content=[{"type": "text", "text": "a bo", "index": 1}]),
        AIMessageChunk(content=[{"type": "text", "text": "mb", "index": 1}]),
    ]
    chunks = list(keyword_guard().transform(iter(parts)))
    assert join(chunks).content == [{"type": "text", "text": SAFE, "index": 1}]


def test_a_model_that_does_not_stream_gives_its_message() -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage("a bomb", id="m")]), disable_streaming=True)
    chunks = list((model | keyword_guard()).stream("hi"))
    assert [(chunk.content, chunk.id) for chunk in chunks] == [(SAFE, "m")]


def test_streams_of_dicts() -> None:
    guard = keyword_guard()
    chain = {"question": RunnablePassthrough(), "answer": EchoModel(label="bomb for") | StrOutputParser()} | guard
    assert list(chain.stream("How?")) == [SAFE]
    assert asked(guard)[0].question == "How?"
    assert asked(guard)[0].answer == "bomb for How? "


def test_streaming_one_value() -> None:
    assert list(keyword_guard().stream("a bomb")) == [SAFE]


def test_an_empty_stream_gives_nothing() -> None:
    assert list(keyword_guard().transform(iter([]))) == []


def test_a_stream_that_breaks_gives_nothing() -> None:
    def broken(_: Iterator[str]) -> Iterator[str]:
        yield "half of a bo"
        raise RuntimeError("connection lost")

    out: list[object] = []
    with pytest.raises(RuntimeError, match="connection lost"):
        out.extend((RunnableGenerator(broken) | keyword_guard()).stream("x"))
    assert out == []


def test_what_follows_a_guard_still_streams() -> None:
    chain = EchoModel(label="bomb") | keyword_guard() | StrOutputParser()
    assert list(chain.stream("hi")) == [SAFE]


async def test_astream_events_show_no_raw_text_of_the_guard() -> None:
    chain = EchoModel(label="a bomb for") | keyword_guard().with_config(run_name="guard")
    events = [event async for event in chain.astream_events("you", version="v2")]
    guard_run = next(event["run_id"] for event in events if event["name"] == "guard")
    seen = set()
    for event in events:
        if event["event"].startswith("on_chat_model"):
            continue
        # What went into the guard is the model's text; all that it gives out is clean.
        out = {key: value for key, value in event["data"].items() if key != "input"}
        assert "bomb" not in repr(out), event["event"]
        if event["run_id"] == guard_run or guard_run in event["parent_ids"]:
            seen.add(event["event"])
    assert seen >= {"on_parser_start", "on_parser_stream", "on_parser_end", "on_custom_event"}
