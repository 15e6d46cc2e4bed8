"""Every place for a guard, in every shape of chain, graph and agent, and all that is seen of the model there."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import count
from operator import or_
from typing import Any

from langchain.agents import create_agent
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel
from langchain_core.runnables.history import RunnableWithMessageHistory
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import START, MessagesState, StateGraph

from integrations.langchain_models import keyword_guard
from integrations.langchain_surfaces import CALLS, Model, Watch, show
from langchain_mllm_protector import ProtectedChatModel, ProtectorGuard, ProtectorMiddleware

MODES = ["messages", "updates", "values", "custom", "tasks", "checkpoints", "debug"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model with a guard in one of its places: around it, in its agent, behind it, or nowhere."""

    model: BaseChatModel
    middleware: tuple[ProtectorMiddleware, ...] = ()
    behind: ProtectorGuard | None = None


GUARDS: dict[str, Callable[[Model, ProtectorGuard], Setup]] = {
    "none": lambda model, guard: Setup(model=model),
    "ProtectorGuard": lambda model, guard: Setup(model=model, behind=guard),
    "ProtectorMiddleware": lambda model, guard: Setup(model=model, middleware=(ProtectorMiddleware(guard=guard),)),
    "ProtectedChatModel": lambda model, guard: Setup(model=ProtectedChatModel(model=model, guard=guard)),
}

Make = Callable[[Model], Setup]
Seen = dict[str, str]


def water(plant: str) -> str:
    """Waters a plant."""
    return f"{plant} is wet"


def same(value: Any) -> Any:
    return value


def last_message(state: Any) -> Any:
    return state["messages"][-1]


def piped(*steps: Any) -> Any:
    return reduce(or_, [step for step in steps if step is not None])


def agent_of(setup: Setup, **settings: Any) -> Any:
    return create_agent(setup.model, tools=[water], middleware=setup.middleware, **settings)


def source(setup: Setup) -> Runnable[Any, Any]:
    """What answers: the model, or an agent where the guard needs one."""
    if not setup.middleware:
        return setup.model
    agent = agent_of(setup)

    def ask(value: Any, config: Any) -> Any:
        return last_message(agent.invoke({"messages": value}, config))

    async def aask(value: Any, config: Any) -> Any:
        return last_message(await agent.ainvoke({"messages": value}, config))

    return RunnableLambda(ask, aask)


def alone(setup: Setup) -> Any:
    return piped(source(setup), setup.behind)


def parallel(make: Make, model: Model) -> Any:
    return RunnableParallel(first=alone(make(model)), second=alone(make(model)))


def fallbacks(make: Make, model: Model) -> Any:
    broken = make(model.model_copy(update={"fails": True}))
    return alone(broken).with_fallbacks([alone(make(model))])


def nested(make: Make, model: Model) -> Any:
    setup = make(model)
    return piped(same, piped(RunnableLambda(same), source(setup)).with_config(run_name="inner"), setup.behind)


CHAINS: dict[str, Callable[[Make, Model], Any]] = {
    "alone": lambda make, model: alone(make(model)),
    "chain": lambda make, model: piped(RunnableLambda(same), alone(make(model)), StrOutputParser()),
    "nested": nested,
    "parallel": parallel,
    "fallbacks": fallbacks,
}


def node(make: Make, model: Model) -> tuple[Any, Any]:
    answer = alone(make(model))

    def tell(state: MessagesState) -> dict[str, Any]:
        write = get_stream_writer()
        for chunk in answer.stream(state["messages"][:1]):
            write(chunk)
        return {}

    ask = piped(lambda state: state["messages"], answer, lambda message: {"messages": [message]})
    building = StateGraph(MessagesState).add_sequence([("ask", ask), ("tell", tell)]).add_edge(START, "ask")
    app = building.compile(checkpointer=InMemorySaver())
    return app, app


def two_nodes(make: Make, model: Model) -> tuple[Any, Any]:
    setup = make(model)
    ask = piped(lambda state: state["messages"], source(setup), lambda message: {"messages": [message]})
    judge = piped(last_message, setup.behind or RunnableLambda(same), lambda message: {"messages": [message]})
    building = StateGraph(MessagesState).add_sequence([("ask", ask), ("judge", judge)]).add_edge(START, "ask")
    app = building.compile(checkpointer=InMemorySaver())
    return app, app


def agent(make: Make, model: Model) -> tuple[Any, Any]:
    setup = make(model)
    app = agent_of(setup, checkpointer=InMemorySaver())
    return app, app if setup.behind is None else piped(app, last_message, setup.behind)


GRAPHS: dict[str, Callable[[Make, Model], tuple[Any, Any]]] = {"node": node, "two nodes": two_nodes, "agent": agent}
"""The graph that is looked into, and the runnable that is called."""


async def seen_in(guard: str, shape: str, model: Model, stream: str) -> Seen:
    """What is seen of the model, by place."""

    def make(model: Model) -> Setup:
        return GUARDS[guard](model, keyword_guard(stream=stream))

    if shape in CHAINS:
        return await seen_in_chain(CHAINS[shape](make, model))
    return await seen_in_graph(*GRAPHS[shape](make, model))


async def seen_in_chain(chain: Any) -> Seen:
    watch = Watch()
    config = {"callbacks": [watch.ear]}
    with watch.on():
        seen = {call: repr(await show(call, chain, config)) for call in CALLS}
        seen["events v2"] = repr([event async for event in chain.astream_events("Hi", config, version="v2")])
    if isinstance(chain, BaseChatModel):
        stream = await chain.astream_events("Hi", config, version="v3")
        seen["events v3"] = repr([*chain.stream_events("Hi", config, version="v3"), *[event async for event in stream]])
    return seen | {"history": repr(await remembered(chain)), "tracers": watch.seen()}


async def remembered(chain: Any) -> list[Any]:
    """What a message history keeps of each kind of call."""
    kept = []
    for call in ("invoke", "ainvoke", "stream", "astream"):
        history = InMemoryChatMessageHistory()
        key = "first" if isinstance(chain, RunnableParallel) else None
        chatting = RunnableWithMessageHistory(chain, lambda _, history=history: history, output_messages_key=key)
        await show(call, chatting, {"configurable": {"session_id": "1"}})
        question, answer = history.messages
        kept.append((question, answer))
    return kept


async def seen_in_graph(app: Any, called: Any) -> Seen:
    watch, threads, seen = Watch(), count(), defaultdict[str, str](str)
    asked = {"messages": ["Hi"]}

    def config() -> dict[str, Any]:
        return {"callbacks": [watch.ear], "configurable": {"thread_id": str(next(threads))}}

    def note(parts: Sequence[tuple[Any, str, Any]]) -> None:
        for _, mode, part in parts:
            seen[mode] += repr(part)

    with watch.on():
        for call in ("invoke", "ainvoke"):
            seen[call] = repr(await show(call, called, config(), asked))
        for call in ("batch", "abatch"):
            seen[call] = repr(await show(call, called, [config(), config()], asked))
        note(list(app.stream(asked, config(), stream_mode=MODES, subgraphs=True)))
        note([part async for part in app.astream(asked, config(), stream_mode=MODES, subgraphs=True)])
        seen["events v2"] = repr([event async for event in app.astream_events(asked, config(), version="v2")])
        stream = await app.astream_events(asked, config(), version="v3")
        seen["events v3"] = repr([event async for event in stream])
        seen["events v3"] += repr(list(app.stream_events(asked, config(), version="v3")))
    saver = app.checkpointer
    seen["checkpointer"] = repr((saver.storage, saver.writes, saver.blobs)) + "".join(
        repr(list(app.get_state_history({"configurable": {"thread_id": str(thread)}})))
        for thread in range(next(threads))
    )
    return {**seen, "tracers": watch.seen()}
