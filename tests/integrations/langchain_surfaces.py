"""A harmful chat model, and all the places where words of its answer could be seen."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.context import collect_runs
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import START, MessagesState, StateGraph
from langsmith import Client, tracing_context
from pydantic import Field

from mllm_protector_guard import GuardRecord

RAW = "Brew a quaffle bomb with zumblot"
WORDS = ("quaffle", "bomb", "zumblot")
ROSES = "Plant roses."


class Model(BaseChatModel):
    """Says one text, in pieces when streamed. With `inside`, another model is called to say it."""

    harmful: bool = True
    inside: bool = False
    fails: bool = False
    rows: int = 1
    closed: list[str] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "model"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Runnable[Any, AIMessage]:
        return self.bind(tools=[tool.name for tool in tools], **kwargs)

    def _chunks(self, messages: list[BaseMessage], kwargs: dict[str, Any]) -> Iterator[ChatGenerationChunk]:
        if self.inside:
            for chunk in Model(harmful=self.harmful).stream(messages):
                yield ChatGenerationChunk(message=chunk)
            return
        if kwargs.get("tools") and not isinstance(messages[-1], ToolMessage):
            for args in ('{"pla', 'nt": "rose"}'):
                call = {"name": "water" if "{" in args else None, "args": args, "id": "c" if "{" in args else None}
                yield ChatGenerationChunk(message=AIMessageChunk("", tool_call_chunks=[{**call, "index": 0}]))
        else:
            for word in (RAW if self.harmful else "\n".join([ROSES] * self.rows)).split(" "):
                chunk = AIMessageChunk(word if word.endswith(".") else word + " ")
                yield ChatGenerationChunk(message=chunk, generation_info={"logprobs": {"content": [{"token": word}]}})
                if self.fails:
                    raise ConnectionError("the line is dead")
        usage = {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}
        last = AIMessageChunk("", usage_metadata=usage, response_metadata={"model_name": "m"}, chunk_position="last")
        yield ChatGenerationChunk(message=last, generation_info={"finish_reason": "stop"})

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        first, *rest = self._chunks(messages, kwargs)
        whole = first + rest
        fields = whole.message.model_dump(exclude={"type", "tool_call_chunks", "chunk_position"})
        generation = ChatGeneration(message=AIMessage(**fields), generation_info=whole.generation_info)
        output = {"token_usage": {"total_tokens": 5}, "raw": whole.text}
        return ChatResult(generations=[generation] * kwargs.get("n", 1), llm_output=output)

    def _stream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        try:
            yield from self._chunks(messages, kwargs)
        finally:
            self.closed.append("stream")

    async def _astream(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        try:
            if self.inside:
                async for part in Model(harmful=self.harmful).astream(messages):
                    yield ChatGenerationChunk(message=part)
            else:
                for chunk in self._chunks(messages, kwargs):
                    yield chunk
        finally:
            self.closed.append("astream")


class Ear(BaseCallbackHandler):
    """Hears every event, in order, with all that comes with it."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []


def _hearing(name: str) -> Callable[..., None]:
    return lambda self, *args, **kwargs: self.heard.append((name, repr((args, kwargs))))


for _name in [name for name in dir(BaseCallbackHandler) if name.startswith("on_")]:
    setattr(Ear, _name, _hearing(_name))


class ListSink:
    def __init__(self) -> None:
        self.records: list[GuardRecord] = []

    def emit(self, record: GuardRecord) -> None:
        self.records.append(record)


class TreeTracer(BaseTracer):
    """Keeps finished root runs, as tracing back ends do."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[Any] = []

    def _persist_run(self, run: Any) -> None:
        self.roots.append(run)


class RecordingClient(Client):
    """A LangSmith client that sends nothing."""

    def __init__(self) -> None:
        super().__init__(api_url="http://localhost:1", api_key="none", auto_batch_tracing=False)
        self.sent: list[str] = []

    def create_run(self, *args: Any, **kwargs: Any) -> None:
        self.sent.append(repr((args, kwargs)))

    update_run = create_run


def graph(model: Runnable[Any, Any]) -> Any:
    def ask(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    def tell(state: MessagesState) -> dict[str, Any]:
        write = get_stream_writer()
        for chunk in model.stream(state["messages"]):
            write(chunk)
        return {}

    building = StateGraph(MessagesState).add_sequence([ask, tell]).add_edge(START, "ask")
    return building.compile(checkpointer=InMemorySaver())


MODES = ["messages", "updates", "values", "custom", "checkpoints", "tasks"]


async def in_graph(model: Any, config: Any) -> list[object]:
    config = {**config, "configurable": {"thread_id": "1"}}
    compiled = graph(model)
    seen: list[object] = list(compiled.stream({"messages": ["Hi"]}, config, stream_mode=MODES))
    seen += [part async for part in compiled.astream({"messages": ["Hi"]}, config, stream_mode=MODES)]
    return [*seen, *compiled.get_state_history(config), compiled.checkpointer.storage, compiled.checkpointer.blobs]


async def in_agent(model: Any, config: Any) -> list[object]:
    agent = create_agent(model, tools=[])
    seen: list[object] = list(agent.stream({"messages": ["Hi"]}, config, stream_mode=MODES[:4]))
    return seen + [event async for event in agent.astream_events({"messages": ["Hi"]}, config, version="v2")]


async def in_async_stream(model: Any, config: Any) -> list[object]:
    return [chunk async for chunk in model.astream("Hi", config)]


async def in_events(model: Any, config: Any) -> list[object]:
    chain = RunnableLambda(lambda text: text) | model | StrOutputParser()
    return [event async for event in chain.astream_events("Hi", config, version="v2")]


async def in_protocol_events(model: Any, config: Any) -> list[object]:
    stream = await model.astream_events("Hi", config, version="v3")
    return [*model.stream_events("Hi", config, version="v3"), *[event async for event in stream]]


SURFACES: dict[str, Callable[[Any, Any], Any]] = {
    "invoke": lambda model, config: model.invoke("Hi", config),
    "ainvoke": lambda model, config: model.ainvoke("Hi", config),
    "batch": lambda model, config: model.batch(["Hi", "Ho"], config),
    "abatch": lambda model, config: model.abatch(["Hi", "Ho"], config),
    "generate": lambda model, config: model.generate([[HumanMessage("Hi")]], callbacks=config["callbacks"]),
    "stream": lambda model, config: list(model.stream("Hi", config)),
    "astream": in_async_stream,
    "chain": lambda model, config: list((RunnableParallel(a=model) | str).stream("Hi", config)),
    "events v2": in_events,
    "events v3": in_protocol_events,
    "graph": in_graph,
    "agent": in_agent,
}


async def show(surface: str, model: Any, config: Any) -> object:
    """What the caller gets to see of a model."""
    seen = SURFACES[surface](model, config)
    return await seen if asyncio.iscoroutine(seen) else seen


def told_by(run: Any) -> list[object]:
    below = [told for child in run.child_runs for told in told_by(child)]
    return [run.inputs, run.outputs, run.events, run.extra, run.error, *below]


async def seen_in(surface: str, model: Any) -> str:
    """All that is seen of a model by the caller, by handlers and by tracers of every kind."""
    ear, client = Ear(), RecordingClient()
    with collect_runs() as collected, tracing_context(enabled=True, client=client):
        seen = await show(surface, model, {"callbacks": [ear]})
    runs = [told for run in collected.traced_runs for told in told_by(run)]
    assert ear.heard
    assert client.sent
    assert runs
    return repr((seen, ear.heard, client.sent, runs))
