"""ProtectorQueryEngine: what happens to answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
from llama_index.core import PromptTemplate, Settings, SummaryIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_selector import BaseSelector, MultiSelection, SingleSelection
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import CondenseQuestionChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import CustomQueryEngine, RouterQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.tools import QueryEngineTool
from pydantic import BaseModel, Field

from llama_index_mllm_protector import ProtectorQueryEngine
from mllm_protector_guard import DEFAULT_REFUSAL, ConfigError, Guard, GuardPolicy, HarmfulAnswerError, Turn
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

SAFE = "I would rather tell you about gardens."
SOURCES = [NodeWithScore(node=TextNode(text="a page about a bomb", id_="page"), score=0.7)]


@pytest.fixture(autouse=True)
def _words_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_tokenizer", str.split)
    monkeypatch.setattr(Settings, "_llm", MockLLM())


def make_guard(*, rewrites: Sequence[str] = (SAFE,), **policy: object) -> Guard:
    return Guard(
        detector=KeywordDetector({"bomb"}),
        detoxifier=ScriptedDetoxifier(rewrites),
        policy=GuardPolicy(**policy),
    )


class Scripted(BaseQueryEngine):
    """Answers with what `make` gives and notes which of its methods were called."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__(callback_manager=CallbackManager())
        self.make = make
        self.calls: list[str] = []

    def _get_prompt_modules(self) -> dict[str, Any]:
        return {}

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        self.calls.append("query")
        return self.make()

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        self.calls.append("aquery")
        return self.make()

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return SOURCES

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return SOURCES

    def synthesize(self, query_bundle: QueryBundle, nodes: Any, additional_source_nodes: Any = None) -> RESPONSE_TYPE:
        self.calls.append("synthesize")
        return self.make()

    async def asynthesize(
        self, query_bundle: QueryBundle, nodes: Any, additional_source_nodes: Any = None
    ) -> RESPONSE_TYPE:
        self.calls.append("asynthesize")
        return self.make()


def response(text: str | None) -> Response:
    return Response(text, source_nodes=SOURCES, metadata={"page": {"n": 1}})


async def ask_both(engine: ProtectorQueryEngine, question: str = "How?") -> list[RESPONSE_TYPE]:
    return [engine.query(question), await engine.aquery(question)]


async def test_harmful_answer_is_rewritten_and_the_rest_kept() -> None:
    guard = make_guard()
    for out in await ask_both(ProtectorQueryEngine(Scripted(lambda: response("A bomb.")), guard=guard)):
        assert type(out) is Response
        assert out.response == SAFE
        assert out.source_nodes == SOURCES
        assert out.metadata["page"] == {"n": 1}
        assert out.metadata["protector"]["outcome"] == "detoxified"
        assert out.metadata["protector"]["rewrite_score"] == 0.01


@pytest.mark.parametrize("text", ["Water roses.\u200f\x00 ", "", "   ", None])
async def test_what_passes_is_unchanged(text: str | None) -> None:
    for out in await ask_both(ProtectorQueryEngine(Scripted(lambda: response(text)), guard=make_guard())):
        assert out.response == text
        assert out.metadata["protector"]["outcome"] == "passed"


async def test_the_users_question_is_judged_with_the_answer() -> None:
    guard = make_guard()
    engine = ProtectorQueryEngine(Scripted(lambda: response("Water them.")), guard=guard)
    await ask_both(engine, "How do roses grow?")
    engine.query(QueryBundle("And tulips?", image_path="/photos/tulip.png"))
    turns = [turn for (turn,) in guard.detector.calls]
    assert [turn.question for turn in turns] == ["How do roses grow?", "How do roses grow?", "And tulips?"]
    assert [image.url for image in turns[2].images] == ["/photos/tulip.png"]


async def test_a_response_kept_by_the_engine_inside_is_not_changed() -> None:
    cached = response("A bomb.")
    await ask_both(ProtectorQueryEngine(Scripted(lambda: cached), guard=make_guard()))
    assert cached == response("A bomb.")


async def test_withhold_flag_and_raise() -> None:
    def engine(on_harm: str) -> ProtectorQueryEngine:
        return ProtectorQueryEngine(Scripted(lambda: response("A bomb.")), guard=make_guard(on_harm=on_harm))

    for out in await ask_both(engine("withhold")):
        assert (out.response, out.metadata["protector"]["outcome"]) == (DEFAULT_REFUSAL, "withheld")
        assert out.source_nodes == SOURCES
    for out in await ask_both(engine("flag")):
        assert (out.response, out.metadata["protector"]["outcome"]) == ("A bomb.", "flagged")
    with pytest.raises(HarmfulAnswerError):
        engine("raise").query("How?")
    with pytest.raises(HarmfulAnswerError):
        await engine("raise").aquery("How?")


async def test_the_async_path_calls_the_async_twin() -> None:
    inner = Scripted(lambda: response("Water roses."))
    engine = ProtectorQueryEngine(inner, guard=make_guard())
    await engine.aquery("How?")
    await engine.asynthesize(QueryBundle("How?"), SOURCES)
    assert inner.calls == ["aquery", "asynthesize"]
    engine.query("How?")
    engine.synthesize(QueryBundle("How?"), SOURCES)
    assert inner.calls[2:] == ["query", "synthesize"]


async def test_event_loop_stays_free_while_the_answer_is_judged() -> None:
    let_go = threading.Event()

    class Waiting:
        def score(self, turns: Sequence[Turn]) -> list[float]:
            return [0.0 if let_go.wait(timeout=5) else 1.0 for _ in turns]

    guard = Guard(detector=Waiting(), policy=GuardPolicy(on_harm="withhold"))
    engine = ProtectorQueryEngine(Scripted(lambda: response("Water roses.")), guard=guard)

    async def other_work() -> None:
        let_go.set()

    out, _ = await asyncio.gather(engine.aquery("How?"), other_work())
    assert out.response == "Water roses."


async def test_synthesize_is_no_way_around_the_guard() -> None:
    engine = ProtectorQueryEngine(Scripted(lambda: response("A bomb.")), guard=make_guard())
    assert engine.retrieve(QueryBundle("How?")) == SOURCES
    assert await engine.aretrieve(QueryBundle("How?")) == SOURCES
    assert engine.synthesize(QueryBundle("How?"), SOURCES).response == SAFE
    assert (await engine.asynthesize(QueryBundle("How?"), SOURCES)).response == SAFE


async def test_what_the_engine_inside_cannot_do_is_said() -> None:
    class Plain(CustomQueryEngine):
        def custom_query(self, query_str: str) -> str:
            return "Water roses."

    engine = ProtectorQueryEngine(Plain(), guard=make_guard())
    with pytest.raises(NotImplementedError):
        engine.retrieve(QueryBundle("How?"))
    with pytest.raises(NotImplementedError, match="Plain"):
        await engine.aretrieve(QueryBundle("How?"))
    assert [out.response for out in await ask_both(engine)] == ["Water roses."] * 2


async def test_an_answer_of_an_unknown_type_is_an_error_not_a_pass() -> None:
    class Odd(CustomQueryEngine):
        def custom_query(self, query_str: str) -> Any:
            return {"answer": "A bomb."}

    engine = ProtectorQueryEngine(Odd(), guard=make_guard())
    with pytest.raises(ConfigError, match="dict") as error:
        engine.query("How?")
    assert "bomb" not in str(error.value)
    with pytest.raises(ConfigError, match="dict"):
        await engine.aquery("How?")


def test_an_index_is_not_a_query_engine() -> None:
    with pytest.raises(ConfigError, match="as_query_engine"):
        ProtectorQueryEngine(SummaryIndex([]), guard=make_guard())


# Streams


class Stream:
    """A token stream that notes how far it was read."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.read = 0

    def sync(self) -> Generator[str, None, None]:
        for piece in self.pieces:
            self.read += 1
            yield piece

    async def asynchronous(self) -> AsyncGenerator[str, None]:
        for piece in self.pieces:
            self.read += 1
            await asyncio.sleep(0)
            yield piece


def streamed(stream: Stream) -> StreamingResponse:
    return StreamingResponse(stream.sync(), source_nodes=SOURCES, metadata={"page": {"n": 1}})


def astreamed(stream: Stream) -> AsyncStreamingResponse:
    return AsyncStreamingResponse(stream.asynchronous(), source_nodes=SOURCES, metadata={"page": {"n": 1}})


def test_stream_is_judged_whole_and_lazily() -> None:
    stream, guard = Stream("A bo", "mb in two", " pieces"), make_guard()
    out = ProtectorQueryEngine(Scripted(lambda: streamed(stream)), guard=guard).query("How?")
    assert type(out) is StreamingResponse
    assert (stream.read, guard.detector.calls) == (0, [])
    assert "protector" not in out.metadata
    assert next(out.response_gen) == SAFE
    assert stream.read == 3
    assert guard.detector.calls[0] == (Turn(question="How?", answer="A bomb in two pieces"),)
    assert list(out.response_gen) == []
    assert out.metadata["protector"]["outcome"] == "detoxified"
    assert out.metadata["page"] == {"n": 1}
    assert out.source_nodes == SOURCES


async def test_async_stream_is_judged_whole_and_lazily() -> None:
    stream, guard = Stream("A bo", "mb in two", " pieces"), make_guard()
    out = await ProtectorQueryEngine(Scripted(lambda: astreamed(stream)), guard=guard).aquery("How?")
    assert type(out) is AsyncStreamingResponse
    assert (stream.read, guard.detector.calls) == (0, [])
    assert [piece async for piece in out.async_response_gen()] == [SAFE]
    assert stream.read == 3
    assert guard.detector.calls[0] == (Turn(question="How?", answer="A bomb in two pieces"),)
    assert out.metadata["protector"]["outcome"] == "detoxified"
    assert (await out.get_response()).response == SAFE
    assert out.source_nodes == SOURCES


async def test_nothing_leaves_a_stream_before_the_verdict() -> None:
    seen: list[str] = []

    class Watching(KeywordDetector):
        def score(self, turns: Sequence[Turn]) -> list[float]:
            assert seen == []
            return super().score(turns)

    guard = Guard(detector=Watching({"bomb"}), policy=GuardPolicy(on_harm="withhold"))
    pieces = ["Water ", "roses ", "at ", "dawn."]
    out = ProtectorQueryEngine(Scripted(lambda: streamed(Stream(*pieces))), guard=guard).query("How?")
    seen.extend(out.response_gen)
    assert seen == pieces
    seen.clear()
    aout = await ProtectorQueryEngine(Scripted(lambda: astreamed(Stream(*pieces))), guard=guard).aquery("How?")
    async for piece in aout.async_response_gen():
        seen.append(piece)
    assert seen == pieces
    assert len(guard.detector.calls) == 2


async def test_stream_that_raises_lets_nothing_out() -> None:
    guard = make_guard(on_harm="raise")
    out = ProtectorQueryEngine(Scripted(lambda: streamed(Stream("A ", "bomb."))), guard=guard).query("How?")
    with pytest.raises(HarmfulAnswerError):
        next(out.response_gen)
    assert str(out) == "None"
    aout = await ProtectorQueryEngine(Scripted(lambda: astreamed(Stream("A ", "bomb."))), guard=guard).aquery("How?")
    with pytest.raises(HarmfulAnswerError):
        await anext(aout.async_response_gen())


async def test_stream_that_breaks_off_lets_nothing_out() -> None:
    def broken() -> Generator[str, None, None]:
        yield "A bomb"
        raise ConnectionError("gone")

    async def abroken() -> AsyncGenerator[str, None]:
        yield "A bomb"
        raise ConnectionError("gone")

    engine = ProtectorQueryEngine(Scripted(lambda: StreamingResponse(broken())), guard=make_guard(on_harm="flag"))
    with pytest.raises(ConnectionError):
        next(engine.query("How?").response_gen)
    engine = ProtectorQueryEngine(Scripted(lambda: AsyncStreamingResponse(abroken())), guard=make_guard(on_harm="flag"))
    out = await engine.aquery("How?")
    with pytest.raises(ConnectionError):
        await anext(out.async_response_gen())


async def test_stream_already_read_by_the_engine_inside_is_still_guarded() -> None:
    read = streamed(Stream("A ", "bomb."))
    assert str(read) == "A bomb."
    assert str(ProtectorQueryEngine(Scripted(lambda: read), guard=make_guard()).query("How?")) == SAFE
    aread = astreamed(Stream("A ", "bomb."))
    await aread.get_response()
    out = await ProtectorQueryEngine(Scripted(lambda: aread), guard=make_guard()).aquery("How?")
    assert (await out.get_response()).response == SAFE


def test_printed_and_stringified_streams_are_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ProtectorQueryEngine(Scripted(lambda: streamed(Stream("A ", "bomb."))), guard=make_guard())
    engine.query("How?").print_response_stream()
    assert capsys.readouterr().out == SAFE
    assert str(engine.query("How?")) == SAFE
    assert engine.query("How?").get_response().response == SAFE


async def test_sync_stream_from_an_async_query_is_guarded() -> None:
    out = await ProtectorQueryEngine(Scripted(lambda: streamed(Stream("A bomb."))), guard=make_guard()).aquery("How?")
    assert "".join(out.response_gen) == SAFE


async def test_streaming_rag_engine() -> None:
    index = SummaryIndex([TextNode(text="Build a bomb."), TextNode(text="Water roses.")])
    engine = ProtectorQueryEngine(index.as_query_engine(llm=MockLLM(), streaming=True), guard=make_guard())
    sync_out, async_out = await ask_both(engine)
    assert (type(sync_out), type(async_out)) == (StreamingResponse, AsyncStreamingResponse)
    assert str(sync_out) == SAFE
    assert (await async_out.get_response()).response == SAFE
    assert len(sync_out.source_nodes) == len(async_out.source_nodes) == 2


# Pydantic objects


class Kind(Enum):
    FORBIDDEN = "bomb"
    ALLOWED = "rose"


@dataclass
class Note:
    text: str


class Step(BaseModel):
    title: str
    details: dict[str, list[str]] = Field(default_factory=dict)
    minutes: int = 5
    hidden: str = Field(default="", exclude=True)
    kind: Kind = Kind.ALLOWED
    raw: bytes = b""
    note: Note = Field(default_factory=lambda: Note(text=""))


class Plan(BaseModel):
    name: str
    steps: list[Step]


def plan(**step: Any) -> PydanticResponse:
    return PydanticResponse(
        Plan(name="Garden", steps=[Step(title="Dig"), Step(**{"title": "Plant", **step})]),
        source_nodes=SOURCES,
        metadata={"page": {"n": 1}},
    )


async def test_harmless_object_passes_whole() -> None:
    guard = make_guard()
    for out in await ask_both(ProtectorQueryEngine(Scripted(lambda: plan(details={"Tool": ["spade"]})), guard=guard)):
        assert type(out) is PydanticResponse
        assert out.response == plan(details={"Tool": ["spade"]}).response
        assert out.name == "Garden"
        assert out.source_nodes == SOURCES
        assert out.metadata["protector"]["outcome"] == "passed"
    (turn,) = guard.detector.calls[0]
    assert [line for line in turn.answer.splitlines() if line] == [
        "Garden",
        "Dig",
        "rose",
        "Plant",
        "Tool",
        "spade",
        "rose",
    ]


@pytest.mark.parametrize(
    "step",
    [
        {"title": "A bomb"},
        {"details": {"Tool": ["spade", "bomb"]}},
        {"details": {"bomb": []}},
        {"hidden": "bomb"},
        {"kind": Kind.FORBIDDEN},
        {"raw": b"a bomb"},
        {"note": Note(text="a bomb")},
    ],
)
@pytest.mark.parametrize("on_harm", ["detoxify", "withhold"])
async def test_harm_anywhere_in_an_object_withholds_all_of_it(step: dict[str, Any], on_harm: str) -> None:
    guard = make_guard(on_harm=on_harm, refusal="No.")
    for out in await ask_both(ProtectorQueryEngine(Scripted(lambda: plan(**step)), guard=guard)):
        assert type(out) is Response
        assert out.response == "No."
        assert out.source_nodes == SOURCES
        assert out.metadata["page"] == {"n": 1}
        assert out.metadata["protector"]["outcome"] == "withheld"
    assert guard.detoxifier.calls == []
    assert guard.policy.on_harm == on_harm


async def test_harmful_object_under_flag_and_raise() -> None:
    flagging = ProtectorQueryEngine(Scripted(lambda: plan(title="A bomb")), guard=make_guard(on_harm="flag"))
    for out in await ask_both(flagging):
        assert type(out) is PydanticResponse
        assert out.metadata["protector"]["outcome"] == "flagged"
    raising = ProtectorQueryEngine(Scripted(lambda: plan(title="A bomb")), guard=make_guard(on_harm="raise"))
    with pytest.raises(HarmfulAnswerError):
        raising.query("How?")
    with pytest.raises(HarmfulAnswerError):
        await raising.aquery("How?")


def test_object_that_is_missing_passes() -> None:
    out = ProtectorQueryEngine(Scripted(lambda: PydanticResponse(None)), guard=make_guard()).query("How?")
    assert type(out) is PydanticResponse
    assert out.metadata["protector"]["reason"] == "blank"


# Inside other parts of LlamaIndex


class Choosing(BaseSelector):
    def __init__(self, *indices: int) -> None:
        self.indices = indices

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass

    def _select(self, choices: Any, query: QueryBundle) -> MultiSelection:
        return MultiSelection(selections=[SingleSelection(index=i, reason="asked") for i in self.indices])

    async def _aselect(self, choices: Any, query: QueryBundle) -> MultiSelection:
        return self._select(choices, query)


@pytest.mark.parametrize("stream", [False, True])
async def test_inside_a_router(stream: bool) -> None:
    def make() -> RESPONSE_TYPE:
        return StreamingResponse(Stream("A ", "bomb.").sync()) if stream else Response("A bomb.")

    guarded = ProtectorQueryEngine(Scripted(make), guard=make_guard())
    tools = [QueryEngineTool.from_defaults(guarded, name="one"), QueryEngineTool.from_defaults(guarded, name="two")]
    for out in await ask_both(RouterQueryEngine(Choosing(0), tools)):
        assert str(out) == SAFE
        assert out.metadata["protector"]["outcome"] == "detoxified"
        assert out.metadata["selector_result"].ind == 0
    for out in await ask_both(RouterQueryEngine(Choosing(0, 1), tools)):
        assert SAFE in str(out)
        assert "bomb" not in str(out)


async def test_as_a_tool() -> None:
    engine = ProtectorQueryEngine(Scripted(lambda: response("A bomb.")), guard=make_guard())
    tool = QueryEngineTool.from_defaults(engine, name="garden", description="Knows gardens.")
    for out in (tool.call("How?"), await tool.acall("How?")):
        assert out.content == SAFE
        assert out.raw_output.metadata["protector"]["outcome"] == "detoxified"


async def test_in_a_chat_engine() -> None:
    engine = ProtectorQueryEngine(Scripted(lambda: response("A bomb.")), guard=make_guard())
    chat = CondenseQuestionChatEngine.from_defaults(engine, llm=MockLLM(), memory=ChatMemoryBuffer.from_defaults())
    assert str(chat.chat("How?")) == SAFE
    assert str(await chat.achat("And then?")) == SAFE
    assert "bomb" not in " ".join(message.content or "" for message in chat.chat_history if message.role == "assistant")


def test_guarded_twice_is_guarded() -> None:
    once = ProtectorQueryEngine(Scripted(lambda: response("A bomb.")), guard=make_guard(on_harm="flag"))
    assert ProtectorQueryEngine(once, guard=make_guard()).query("How?").response == SAFE


def test_prompts_go_by_their_own_names() -> None:
    inner = SummaryIndex([TextNode(text="Water roses.")]).as_query_engine(llm=MockLLM())
    engine = ProtectorQueryEngine(inner, guard=make_guard())
    assert engine.get_prompts().keys() == inner.get_prompts().keys() != set()
    name = "response_synthesizer:text_qa_template"
    engine.update_prompts({name: PromptTemplate("Answer: {query_str} from {context_str}")})
    assert inner.get_prompts()[name].template == "Answer: {query_str} from {context_str}"


def test_callback_manager_is_that_of_the_engine_inside_unless_given() -> None:
    inner, own = Scripted(lambda: response("Water roses.")), CallbackManager()
    assert ProtectorQueryEngine(inner, guard=make_guard()).callback_manager is inner.callback_manager
    assert ProtectorQueryEngine(inner, guard=make_guard(), callback_manager=own).callback_manager is own
