"""The guard inside agents of `create_agent`."""

import asyncio
import doctest
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRetryMiddleware, ToolRetryMiddleware
from langchain.agents.structured_output import ProviderStrategy, StructuredOutputValidationError, ToolStrategy
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import BaseModel

from integrations.langchain_models import SAFE, ListSink, keyword_guard
from langchain_mllm_protector import ProtectorCallbackHandler, ProtectorGuard, ProtectorMiddleware, middleware
from langchain_mllm_protector.middleware import TOOL_REFUSAL
from mllm_protector_guard import (
    DEFAULT_REFUSAL,
    ConfigError,
    DetectorError,
    Guard,
    GuardPolicy,
    GuardRecord,
    HarmfulAnswerError,
    Turn,
)
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

CANARY = "canary"
HARM = f"First fetch a bomb {CANARY} today."
ROOT = Path(__file__).parents[2]
MODES = ["values", "updates", "messages", "custom", "tasks", "checkpoints", "debug"]

Reply = Callable[[Sequence[BaseMessage]], AIMessage]


class AgentModel(BaseChatModel):
    """Replies with a function of the conversation, in whole or word by word; takes tools."""

    reply: Reply

    @property
    def _llm_type(self) -> str:
        return "agent-model"

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, Any]:
        return self.bind(**kwargs)

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self.reply(messages))])

    def _stream(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        whole = self.reply(messages)
        for word in str(whole.content).split(" "):
            yield ChatGenerationChunk(message=AIMessageChunk(word + " ", id=whole.id))
        calls = [
            {"name": call["name"], "args": json.dumps(call["args"]), "id": call["id"], "index": index}
            for index, call in enumerate(whole.tool_calls)
        ]
        yield ChatGenerationChunk(message=AIMessageChunk("", id=whole.id, tool_call_chunks=calls))


def call(name: str, **args: Any) -> dict[str, Any]:
    return {"name": name, "args": args, "id": f"call-{name}", "type": "tool_call"}


def saying(*answers: str | AIMessage) -> AgentModel:
    """A model that gives its answers one after the other and then the last one again and again."""
    left = list(answers)

    def reply(messages: Sequence[BaseMessage]) -> AIMessage:
        answer = left.pop(0) if len(left) > 1 else left[0]
        return answer.model_copy() if isinstance(answer, AIMessage) else AIMessage(answer)

    return AgentModel(reply=reply)


def guarding(**settings: Any) -> ProtectorMiddleware:
    """A middleware to which every text with "bomb" is harmful."""
    settings = {"detector": KeywordDetector({"bomb"}), "detoxifier": ScriptedDetoxifier([SAFE])} | settings
    return ProtectorMiddleware(**settings)


def scored(guard: ProtectorMiddleware) -> list[Turn]:
    """Every turn that the detector scored, but for rewrites."""
    return [turn for scoring in guard.guard.detector.calls for turn in scoring if turn.answer != SAFE]


ran: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    ran.clear()


@tool
def look_up(word: str) -> str:
    """Looks a word up."""
    ran.append(word)
    return f"{word} is a plant"


@tool
def harmful_lookup(word: str) -> str:
    """Finds something harmful."""
    return HARM


async def ask(agent: Any, text: Any, config: Any = None, *, use_async: bool = False) -> dict[str, Any]:
    asked = {"messages": [HumanMessage(text)]}
    return await agent.ainvoke(asked, config) if use_async else agent.invoke(asked, config)


async def streamed(agent: Any, config: Any, *, use_async: bool, **kwargs: Any) -> list[Any]:
    asked = {"messages": [HumanMessage("What now?")]}
    if use_async:
        return [part async for part in agent.astream(asked, config, **kwargs)]
    return list(agent.stream(asked, config, **kwargs))


def kept(saver: InMemorySaver, agent: Any, config: Any) -> str:
    """All that a checkpointer holds."""
    return repr((saver.storage, saver.writes, saver.blobs, list(agent.get_state_history(config))))


def two_steps() -> AgentModel:
    """Harm beside a tool call, and after the tool's result."""

    def reply(messages: Sequence[BaseMessage]) -> AIMessage:
        if isinstance(messages[-1], ToolMessage):
            return AIMessage(HARM)
        return AIMessage("I look it up.", tool_calls=[call("look_up", word="rose")])

    return AgentModel(reply=reply)


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.with_config(tags=["own"]), lambda m: m.with_retry()])
async def test_messages_show_the_judged_answer_in_one_piece(wrap: Callable[[Any], Any], use_async: bool) -> None:
    agent = create_agent(wrap(saying(AIMessage(HARM, id="answer-1"))), middleware=[guarding()])
    parts = await streamed(agent, None, use_async=use_async, stream_mode="messages")
    assert [(part.content, part.id) for part, _ in parts] == [(SAFE, "answer-1")]


@pytest.mark.parametrize("use_async", [False, True])
async def test_the_replacement_takes_the_id_of_the_answer(use_async: bool) -> None:
    harmful = AIMessage(
        [{"type": "text", "text": HARM}, {"type": "image", "url": "https://example.org/a.png"}],
        id="answer-1",
        additional_kwargs={"reasoning_content": HARM},
        usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
    )
    last = (await ask(create_agent(saying(harmful), middleware=[guarding()]), "q", use_async=use_async))["messages"][-1]
    assert (last.id, last.content, last.additional_kwargs) == ("answer-1", SAFE, {})
    assert last.usage_metadata == harmful.usage_metadata
    record = GuardRecord.model_validate(last.response_metadata["protector"])
    assert (record.outcome, record.question_match, record.integration) == ("detoxified", "explicit", "langchain")


async def test_a_harmless_answer_stays_as_it_is() -> None:
    answer = AIMessage([{"type": "text", "text": "Roses."}], id="answer-1", additional_kwargs={"x": 1})
    last = (await ask(create_agent(saying(answer), middleware=[guarding()]), "q"))["messages"][-1]
    record = last.response_metadata.pop("protector")
    assert last == answer
    assert record["outcome"] == "passed"


async def test_every_turn_of_a_thread_is_judged_with_its_own_question() -> None:
    guard = guarding()
    agent = create_agent(two_steps(), [look_up], middleware=[guard], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    for use_async, question in ((False, "one"), (True, "two"), (False, "three")):
        state = await ask(agent, question, config, use_async=use_async)
    assert [(turn.question, turn.answer) for turn in scored(guard)] == [
        (question, answer) for question in ("one", "two", "three") for answer in ("I look it up.", "rose", HARM)
    ]
    assert [type(message).__name__ for message in state["messages"]] == [
        "HumanMessage", "AIMessage", "ToolMessage", "AIMessage"
    ] * 3  # fmt: skip
    assert CANARY not in repr(state)


async def test_images_of_the_user_reach_the_detector() -> None:
    guard = guarding()
    image = {"type": "image", "base64": "aGk=", "mime_type": "image/png"}
    await ask(create_agent(saying("Roses."), middleware=[guard]), [{"type": "text", "text": "What is it?"}, image])
    (turn,) = scored(guard)
    assert turn.question == "What is it?"
    assert [picture.content for picture in turn.images] == [b"hi"]


@pytest.mark.parametrize("use_async", [False, True])
async def test_policies(use_async: bool) -> None:
    def agent(**settings: Any) -> Any:
        return create_agent(saying(HARM), middleware=[guarding(**settings)])

    async def answer(**settings: Any) -> BaseMessage:
        return (await ask(agent(**settings), "q", use_async=use_async))["messages"][-1]

    withheld = await answer(on_harm="withhold", refusal="No.")
    assert (withheld.content, withheld.response_metadata["protector"]["outcome"]) == ("No.", "withheld")
    flagged = await answer(on_harm="flag")
    assert (flagged.content, flagged.response_metadata["protector"]["outcome"]) == (HARM, "flagged")
    with pytest.raises(HarmfulAnswerError) as raised:
        await answer(on_harm="raise")
    assert CANARY not in str(raised.value)


@pytest.mark.parametrize("use_async", [False, True])
async def test_errors_withhold_answer_and_calls(use_async: bool) -> None:
    class Broken(KeywordDetector):
        def score(self, turns: Sequence[Turn]) -> list[float]:
            raise RuntimeError("out of memory")

    model = saying(AIMessage("I look it up.", tool_calls=[call("look_up", word="rose")]))
    agent = create_agent(model, [look_up], middleware=[guarding(detector=Broken(()))])
    last = (await ask(agent, "q", use_async=use_async))["messages"][-1]
    assert (last.content, last.tool_calls, ran) == (DEFAULT_REFUSAL, [], [])
    assert last.response_metadata["protector"]["reason"] == "error"
    raising = create_agent(model, [look_up], middleware=[guarding(detector=Broken(()), on_error="raise")])
    with pytest.raises(DetectorError):
        await ask(raising, "q", use_async=use_async)


@pytest.mark.parametrize("use_async", [False, True])
async def test_calls_live_and_die_with_the_text_beside_them(use_async: bool) -> None:
    calls = [call("look_up", word="rose")]
    blocks = [{"type": "text", "text": HARM}, {"type": "tool_use", "id": "call-look_up", "name": "look_up"}]
    for first, words in (
        (AIMessage("I look it up.", tool_calls=calls), ["rose"]),
        (AIMessage("", tool_calls=calls), ["rose"]),
        (AIMessage(HARM, tool_calls=calls, additional_kwargs={"tool_calls": calls}), []),
        (AIMessage(blocks, tool_calls=calls), []),
    ):
        ran.clear()
        agent = create_agent(saying(first, "Done."), [look_up], middleware=[guarding()])
        messages = (await ask(agent, "q", use_async=use_async))["messages"]
        assert ran == words
        if words:
            assert messages[1].tool_calls == calls
        else:
            assert (messages[-1].content, messages[-1].tool_calls, messages[-1].additional_kwargs) == (SAFE, [], {})


class Plan(BaseModel):
    text: str


@pytest.mark.parametrize("use_async", [False, True])
async def test_a_structured_response_dies_with_the_text_it_came_with(use_async: bool) -> None:
    async def result(answer: AIMessage, response_format: Any) -> dict[str, Any]:
        agent = create_agent(saying(answer), middleware=[guarding()], response_format=response_format)
        return await ask(agent, "q", use_async=use_async)

    provider, by_tool = ProviderStrategy(Plan), ToolStrategy(Plan)
    fine = await result(AIMessage('{"text": "roses"}'), provider)
    assert fine["structured_response"] == Plan(text="roses")
    fine = await result(AIMessage("Here it is.", tool_calls=[call("Plan", text="roses")]), by_tool)
    assert fine["structured_response"] == Plan(text="roses")
    for answer, response_format in (
        (AIMessage(json.dumps({"text": HARM})), provider),
        (AIMessage(HARM, tool_calls=[call("Plan", text="roses")]), by_tool),
    ):
        state = await result(answer, response_format)
        assert state["structured_response"] is None
        assert [message.content for message in state["messages"]] == ["q", SAFE]


@pytest.mark.parametrize("use_async", [False, True])
async def test_an_answer_that_breaks_its_format_is_judged_before_an_error_quotes_it(use_async: bool) -> None:
    def agent(answer: str) -> Any:
        return create_agent(saying(answer), middleware=[guarding()], response_format=ProviderStrategy(Plan))

    state = await ask(agent(HARM), "q", use_async=use_async)
    assert (state["messages"][-1].content, state["structured_response"]) == (SAFE, None)
    with pytest.raises(StructuredOutputValidationError):
        await ask(agent("roses"), "q", use_async=use_async)


@pytest.mark.parametrize("use_async", [False, True])
async def test_a_harmful_input_ends_the_turn_before_the_model_is_asked(use_async: bool) -> None:
    guard = guarding(check_input=True, refusal="No.")
    asked: list[Any] = []

    def reply(messages: Sequence[BaseMessage]) -> AIMessage:
        asked.append(messages)
        return AIMessage("Roses.")

    agent = create_agent(AgentModel(reply=reply), [look_up], middleware=[guard], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    refused = await ask(agent, [{"type": "text", "text": "How do I build a bomb?"}], config, use_async=use_async)
    assert (refused["messages"][-1].content, asked) == ("No.", [])
    record = refused["messages"][-1].response_metadata["protector"]
    assert (record["outcome"], record["reason"], record["question_known"]) == ("withheld", "harmful", False)
    answered = await ask(agent, "And roses?", config, use_async=use_async)
    assert answered["messages"][-1].content == "Roses."
    assert [(turn.question, turn.answer) for turn in scored(guard)] == [
        (None, "How do I build a bomb?"),
        (None, "And roses?"),
        ("And roses?", "Roses."),
    ]


async def test_inputs_follow_the_policy_but_are_never_rewritten() -> None:
    async def last(text: str = "a bomb", **settings: Any) -> BaseMessage:
        agent = create_agent(saying("Roses."), middleware=[guarding(check_input=True, **settings)])
        return (await ask(agent, text))["messages"][-1]

    assert (await last()).content == DEFAULT_REFUSAL
    assert (await last(on_harm="flag")).content == "Roses."
    assert (await last("an oak", on_missing_question="withhold")).content == "Roses."
    with pytest.raises(HarmfulAnswerError):
        await last(on_harm="raise")
    detector = KeywordDetector({"bomb"})
    ready = Guard(detector=detector, detoxifier=ScriptedDetoxifier([SAFE]), policy=GuardPolicy(refusal="No."))
    agent = create_agent(saying(HARM), middleware=[ProtectorMiddleware(guard=ready, check_input=True)])
    assert (await ask(agent, "a bomb"))["messages"][-1].content == "No."
    assert (await ask(agent, "roses"))["messages"][-1].content == SAFE
    assert ready.policy.on_harm == "detoxify"


@pytest.mark.parametrize("use_async", [False, True])
async def test_a_harmful_tool_result_becomes_an_error_that_the_model_reads(use_async: bool) -> None:
    read: list[BaseMessage] = []

    def reply(messages: Sequence[BaseMessage]) -> AIMessage:
        read.append(messages[-1])
        if isinstance(messages[-1], ToolMessage):
            return AIMessage("Done.")
        return AIMessage("", tool_calls=[call("look_up", word="rose"), call("harmful_lookup", word="x")])

    guard = guarding(check_tool_results=True)
    saver = InMemorySaver()
    tools = [look_up, harmful_lookup]
    agent = create_agent(AgentModel(reply=reply), tools, middleware=[guard], checkpointer=saver)
    config = {"configurable": {"thread_id": "1"}}
    parts = await streamed(agent, config, use_async=use_async, stream_mode=MODES)
    state = agent.get_state(config).values["messages"]
    good, bad = state[2], state[3]
    assert (good.content, good.status, good.response_metadata["protector"]["outcome"]) == (
        "rose is a plant", "success", "passed"
    )  # fmt: skip
    assert (bad.content, bad.status, bad.tool_call_id, bad.name) == (
        TOOL_REFUSAL, "error", "call-harmful_lookup", "harmful_lookup"
    )  # fmt: skip
    assert read[-1].content == TOOL_REFUSAL
    assert CANARY not in repr(parts) + kept(saver, agent, config)
    assert ("What now?", HARM) in [(turn.question, turn.answer) for turn in scored(guard)]


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
async def test_results_in_commands_are_judged(as_dict: bool, use_async: bool) -> None:
    @tool
    def hand_over(tool_call_id: Annotated[str, InjectedToolCallId]) -> Command[Any]:
        """Hands a result over."""
        message: Any = {"role": "tool", "content": HARM, "tool_call_id": tool_call_id}
        return Command(update={"messages": [message if as_dict else ToolMessage(HARM, tool_call_id=tool_call_id)]})

    model = saying(AIMessage("", tool_calls=[call("hand_over")]), "Done.")
    for check, said in ((True, TOOL_REFUSAL), (False, HARM)):
        agent = create_agent(model, [hand_over], middleware=[guarding(check_tool_results=check)])
        model = saying(AIMessage("", tool_calls=[call("hand_over")]), "Done.")
        messages = (await ask(agent, "q", use_async=use_async))["messages"]
        assert [message.content for message in messages] == ["q", "", said, "Done."]


async def test_tool_results_follow_the_policy() -> None:
    def agent(**settings: Any) -> Any:
        model = saying(AIMessage("", tool_calls=[call("harmful_lookup", word="x")]), "Done.")
        return create_agent(model, [harmful_lookup], middleware=[guarding(check_tool_results=True, **settings)])

    flagged = (await ask(agent(on_harm="flag"), "q"))["messages"][2]
    assert (flagged.content, flagged.status) == (HARM, "success")
    assert flagged.response_metadata["protector"]["outcome"] == "flagged"
    with pytest.raises(HarmfulAnswerError):
        await ask(agent(on_harm="raise"), "q")


async def test_it_judges_what_other_middlewares_made_of_the_answer() -> None:
    class Twist(AgentMiddleware):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return AIMessage(f"{handler(request).result[0].content} {HARM}")

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            return AIMessage(f"{(await handler(request)).result[0].content} {HARM}")

    failures = ["once"]

    def reply(messages: Sequence[BaseMessage]) -> AIMessage:
        if failures:
            raise ConnectionError(failures.pop())
        return AIMessage("Roses.")

    guard = guarding(check_input=True, check_tool_results=True)
    others = [ModelRetryMiddleware(initial_delay=0), ToolRetryMiddleware(), Twist()]
    agent = create_agent(AgentModel(reply=reply), [look_up], middleware=[guard, *others])
    for use_async in (False, True):
        last = (await ask(agent, "q", use_async=use_async))["messages"][-1]
        assert last.content == SAFE
    assert scored(guard)[-1].answer == f"Roses. {HARM}"


async def test_handlers_get_the_record_of_every_check() -> None:
    for use_async in (False, True):
        sink, own = ListSink(), ListSink()
        ready = Guard(
            detector=KeywordDetector({"bomb"}), detoxifier=ScriptedDetoxifier([SAFE]), sinks=[own], trace_content=True
        )
        guard = ProtectorMiddleware(guard=ready, check_input=True, check_tool_results=True)
        agent = create_agent(two_steps(), [look_up], middleware=[guard])
        config = {"callbacks": [ProtectorCallbackHandler(sink=sink)]}
        state = await ask(agent, "roses", config, use_async=use_async)
        assert [(record.answer, record.outcome) for record in sink.records] == [
            ("roses", "passed"),
            ("I look it up.\n\nrose", "passed"),
            ("rose is a plant", "passed"),
            (HARM, "detoxified"),
        ]
        assert own.records == sink.records
        assert all(record.parent_run_id for record in sink.records)
        assert state["messages"][-1].response_metadata["protector"]["id"] == sink.records[-1].id
        assert CANARY not in repr(state)


async def test_fifty_agents_at_once_keep_their_questions() -> None:
    async def words(messages: Sequence[BaseMessage]) -> AsyncIterator[str]:
        for word in ("a", "bomb", "for", str(messages[-1].content)):
            await asyncio.sleep(0)
            yield word

    class SlowModel(AgentModel):
        async def _agenerate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
            text = " ".join([word async for word in words(messages)])
            return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])

    class Mirror(ScriptedDetoxifier):
        def rewrite(self, turns: Sequence[Turn], *, attempt: int = 0) -> list[str]:
            return [f"no to {turn.question}" for turn in turns]

    guard = guarding(detoxifier=Mirror(["unused"]))
    agent = create_agent(SlowModel(reply=lambda _: AIMessage("")), middleware=[guard], checkpointer=InMemorySaver())

    async def one(number: int) -> str:
        state = await ask(agent, f"q{number}", {"configurable": {"thread_id": str(number)}}, use_async=True)
        return str(state["messages"][-1].content)

    assert await asyncio.gather(*map(one, range(50))) == [f"no to q{number}" for number in range(50)]
    harmful = [turn for turn in scored(guard) if "bomb" in turn.answer]
    assert sorted((turn.question, turn.answer) for turn in harmful) == sorted(
        (f"q{number}", f"a bomb for q{number}") for number in range(50)
    )


def test_settings_are_those_of_the_guard() -> None:
    ready = keyword_guard(on_harm="withhold")
    assert ProtectorMiddleware(guard=ready).guard is ready
    assert isinstance(ProtectorMiddleware(threshold=0.25).guard, ProtectorGuard)
    for wrong in ({"treshold": 1}, {"guard": ready, "threshold": 0.5}, {"on_harm": "shout"}):
        with pytest.raises(ConfigError):
            ProtectorMiddleware(**wrong)
    plain = Guard(detector=KeywordDetector(()), policy=GuardPolicy(on_harm="withhold"))
    with pytest.raises(ConfigError, match="'threshold'"):
        ProtectorMiddleware(guard=plain, threshold=0.5)


def test_without_langchain_only_the_middleware_is_missing() -> None:
    code = (
        "import sys\n"
        "sys.modules['langchain'] = None\n"
        "from langchain_mllm_protector import *\n"
        "ProtectorGuard()\n"
        "try:\n"
        "    from langchain_mllm_protector import ProtectorMiddleware\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error.extra, error)\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "integrations")]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.startswith("MissingDependencyError agents "), done.stderr
    assert 'pip install "mllm-protector-guard[agents]"' in done.stdout


def test_importing_the_package_imports_no_langchain() -> None:
    code = "import sys, langchain_mllm_protector as p; print('langchain' in sys.modules, hasattr(p, 'Protector'))"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "integrations")]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "False False", done.stderr


def test_the_example_of_the_docstring_runs() -> None:
    result = doctest.testmod(middleware)
    assert (result.attempted > 0, result.failed) == (True, 0)
