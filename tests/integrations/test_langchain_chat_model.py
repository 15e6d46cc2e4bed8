"""The guarded chat model: a harmless answer is as the model gave it, a harmful one is replaced."""

import asyncio
import pickle
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel, FakeListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.runnables import Runnable, RunnableLambda

from integrations.langchain_models import SAFE, EchoModel, ListSink, asked, keyword_guard
from integrations.langchain_surfaces import RAW, Ear, Model, TreeTracer, show
from langchain_mllm_protector import ProtectedChatModel, ProtectorCallbackHandler, ProtectorGuard
from mllm_protector_guard import DEFAULT_REFUSAL, ConfigError, Guard, GuardPolicy, HarmfulAnswerError
from mllm_protector_guard.fakes import KeywordDetector


def protected(model: BaseChatModel, **settings: Any) -> ProtectedChatModel:
    return ProtectedChatModel(model=model, guard=keyword_guard(**{"capture": False} | settings))


async def test_a_harmless_answer_is_what_the_model_gives() -> None:
    bare, model = Model(says="roses"), protected(Model(says="roses"))
    expected = bare.invoke("Hi")
    for answer in (model.invoke("Hi"), await model.ainvoke("Hi")):
        record = answer.response_metadata.pop("protector")
        assert (record["outcome"], record["question_match"]) == ("passed", "explicit")
        assert answer.model_copy(update={"id": expected.id}) == expected
    joined = join(list(bare.stream("Hi")))
    for chunks in (list(model.stream("Hi")), [chunk async for chunk in model.astream("Hi")]):
        answer = join(chunks)
        assert len({chunk.id for chunk in chunks}) == 1
        assert answer.response_metadata.pop("protector")["outcome"] == "passed"
        assert answer.model_copy(update={"id": joined.id}) == joined


def join(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    return chunks[0] + chunks[1:]


async def test_a_harmful_answer_keeps_its_usage_and_loses_its_log_probabilities() -> None:
    model = protected(Model())
    answers = [model.invoke("Hi"), await model.ainvoke("Hi"), join(list(model.stream("Hi")))]
    answers.append(join([chunk async for chunk in model.astream("Hi")]))
    for answer in answers:
        assert answer.content == SAFE
        assert answer.usage_metadata == {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}
        assert (answer.response_metadata["model_name"], answer.response_metadata["finish_reason"]) == ("m", "stop")
        assert not answer.response_metadata["logprobs"]


async def test_all_generations_are_judged_in_one_batch() -> None:
    for run in (lambda m: m.generate([[HumanMessage("Hi")]], n=3), lambda m: m.agenerate([[HumanMessage("Hi")]], n=3)):
        guard = keyword_guard(capture=False)
        result = run(ProtectedChatModel(model=Model(), guard=guard))
        result = await result if asyncio.iscoroutine(result) else result
        assert [generation.text for generation in result.generations[0]] == [SAFE] * 3
        assert [len(call) for call in guard.detector.calls] == [3, 3]  # the answers, then the rewrites


async def test_the_question_comes_from_the_messages_with_its_images() -> None:
    guard = keyword_guard(capture=False)
    model = ProtectedChatModel(model=Model(says="roses"), guard=guard)
    picture = {"type": "image", "base64": "aGk=", "mime_type": "image/png"}
    asking = HumanMessage([{"type": "text", "text": "What grows here?"}, picture])
    history = [HumanMessage("Hello"), AIMessage("Hi"), asking]
    model.invoke(history)
    await model.ainvoke(history)
    list(model.stream(history))
    async for _ in model.astream(history):
        pass
    assert [(turn.question, turn.images[0].content) for turn in asked(guard)] == [("What grows here?", b"hi")] * 4


async def test_fifty_calls_at_once_keep_each_question_with_its_answer() -> None:
    guard = keyword_guard(capture=False)
    model = ProtectedChatModel(model=EchoModel(slow_s=0.02), guard=guard)
    questions = [f"{'bombs' if i % 3 == 0 else 'roses'} {i}" for i in range(50)]
    answers = await asyncio.gather(*[model.ainvoke(question) for question in questions])
    assert [answer.content for answer in answers] == [SAFE if "bomb" in q else f"answer to {q}" for q in questions]
    assert {turn.question for turn in asked(guard) if turn.answer == f"answer to {turn.question}"} == {*questions}


async def test_each_check_is_reported_once_below_the_run_of_the_model() -> None:
    for surface in ("invoke", "ainvoke", "stream", "astream"):
        sink, ear = ListSink(), Ear()
        model = protected(Model())
        tracer = TreeTracer()
        await show(surface, model, {"callbacks": [ProtectorCallbackHandler(sink=sink), ear, tracer]})
        (record,) = sink.records
        (run,) = tracer.roots
        assert (record.outcome, record.question_match, record.run_id) == ("detoxified", "explicit", str(run.id))
        assert (run.run_type, [child.name for child in run.child_runs]) == ("llm", ["harm_detector", "detoxifier"])
        names = [name for name, _ in ear.heard]
        assert names.index("on_custom_event") < names.index("on_llm_end")


async def test_leaving_early_closes_the_source_and_is_on_record() -> None:
    for surface in ("stream", "astream"):
        sink, ear, source = ListSink(), Ear(), Model(says="roses", rows=99)
        model = ProtectedChatModel(
            model=source, guard=Guard(detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="withhold"))
        )
        config: Any = {"callbacks": [ProtectorCallbackHandler(sink=sink), ear]}
        if surface == "stream":
            chunks = model.stream("Hi", config)
            next(chunks)
            chunks.close()
        else:
            achunks = model.astream("Hi", config)
            await anext(achunks)
            await achunks.aclose()
        assert source.closed == [surface]
        assert [record.error for record in sink.records] == ["GeneratorExit"]
        names = [name for name, _ in ear.heard]
        assert names.index("on_custom_event") < names.index("on_llm_error")


@pytest.mark.parametrize("surface", ["invoke", "ainvoke", "stream", "astream"])
async def test_an_error_of_the_model_passes(surface: str) -> None:
    with pytest.raises(ConnectionError, match="the line is dead"):
        await show(surface, protected(Model(fails=True)), {})


def test_policies_are_those_of_the_guard() -> None:
    with pytest.raises(HarmfulAnswerError):
        protected(Model(), on_harm="raise").invoke("Hi")
    flagged = protected(Model(), on_harm="flag").invoke("Hi")
    assert (flagged.content.strip(), flagged.response_metadata["protector"]["outcome"]) == (RAW, "flagged")
    withheld = protected(Model(says="roses"), on_missing_question="withhold").invoke([AIMessage("Go on")])
    assert withheld.content == DEFAULT_REFUSAL


def test_an_agent_with_tools() -> None:
    agents = pytest.importorskip("langchain.agents")

    def water(plant: str) -> str:
        """Waters a plant."""
        return f"{plant} is wet"

    agent = agents.create_agent(protected(Model()), tools=[water])
    _, called, told, answer = agent.invoke({"messages": ["Hi"]})["messages"]
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("water", {"plant": "rose"})]
    assert called.response_metadata["protector"]["reason"] == "harmless"
    assert (told.content, answer.content) == ("rose is wet", SAFE)


def test_what_is_bound_to_the_model_stays_guarded() -> None:
    model = protected(Model())
    for bound in (model.bind(stop=["x"]), model.bind_tools([]), model.with_retry(), model.with_config(tags=["t"])):
        assert bound.invoke("Hi").content == SAFE


def test_a_model_that_binds_tools_in_an_unknown_way_is_refused() -> None:
    class Odd(Model):
        def bind_tools(self, tools: Any, **kwargs: Any) -> Runnable[Any, AIMessage]:
            return RunnableLambda(self.invoke)

    with pytest.raises(ConfigError, match="RunnableLambda in which no chat model is found"):
        protected(Odd()).bind_tools([])


def test_no_answer_comes_from_a_cache_or_goes_into_one() -> None:
    cache = InMemoryCache()
    set_llm_cache(cache)
    try:
        Model().invoke("Hi")
        held = repr(cache._cache)
        assert protected(Model()).invoke("Hi").content == SAFE
        assert protected(Model()).invoke("Ho").content == SAFE
        assert repr(cache._cache) == held
    finally:
        set_llm_cache(None)
    with pytest.raises(ConfigError, match="cache"):
        ProtectedChatModel(model=Model(), guard=keyword_guard(), cache=True)


def test_a_guard_behind_the_guarded_model_finds_its_question() -> None:
    behind = keyword_guard()
    (protected(Model(inside=True)) | behind).invoke("What now?")
    assert [(turn.question, turn.answer) for turn in asked(behind)] == [("What now?", SAFE)]


def test_the_model_says_of_itself_what_the_wrapped_one_says() -> None:
    class Counting(Model):
        model_name: str = "counting-1"

        def get_token_ids(self, text: str) -> list[int]:
            return [*range(7)]

    inner = Counting(profile={"tool_calling": True}, disable_streaming=True, tags=["mine"])
    model = protected(inner)
    assert (model._llm_type, model.model_name) == ("model", "counting-1")
    if "profile" in BaseChatModel.model_fields:  # older releases have none
        assert model.profile == {"tool_calling": True}
    assert (model.get_num_tokens("x"), model.disable_streaming, model.tags) == (7, True, ["mine"])
    assert model._get_ls_params() == inner._get_ls_params()
    assert len(list(model.stream("Hi"))) == 1
    assert protected(Model()).model_name == "model"


async def test_a_model_that_does_not_stream_gives_one_chunk() -> None:
    class Whole(Model):
        _stream = BaseChatModel._stream
        _astream = BaseChatModel._astream

    model = protected(Whole())
    for chunks in (list(model.stream("Hi")), [chunk async for chunk in model.astream("Hi")]):
        assert [chunk.content for chunk in chunks if chunk.content] == [SAFE]
        assert chunks[0].response_metadata["protector"]["outcome"] == "detoxified"


def test_the_guard_may_be_given_in_three_ways() -> None:
    ready = Guard(detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="withhold"))
    assert ProtectedChatModel(model=Model(), guard=ready).invoke("Hi").content == DEFAULT_REFUSAL
    assert protected(Model()).invoke("Hi").content == SAFE
    assert ProtectedChatModel(model=Model())._protector == ProtectorGuard(capture=False)


def test_wrong_settings_name_their_cure() -> None:
    with pytest.raises(ConfigError, match=r"threshold.*guard=ProtectorGuard"):
        ProtectedChatModel(model=Model(), threshold=0.5)
    with pytest.raises(ConfigError, match="before anything is bound to it"):
        ProtectedChatModel(model=Model().bind(stop=["x"]), guard=keyword_guard())


def test_a_guarded_model_can_be_sent_to_another_process() -> None:
    model = ProtectedChatModel(model=FakeListChatModel(responses=["a bomb"]), guard=keyword_guard(capture=False))
    assert pickle.loads(pickle.dumps(model)).invoke("Hi").content == SAFE
