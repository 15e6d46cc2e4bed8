"""A harmful chat model, the ways to call it, and who listens: callers, handlers and tracers."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tracers.base import BaseTracer
from langchain_core.tracers.context import collect_runs
from langsmith import Client, tracing_context
from pydantic import Field

RAW = "Brew a quaffle bomb with zumblot"
WORDS = ("quaffle", "bomb", "zumblot")
"""What is to be seen nowhere."""

HARM = "Then brew a quaffle bomb with zumblot, as this line tells. "
# Each is long enough to be judged alone, and has a word of its own.
SENTENCES = (
    "Plant the alders in a sunny bed that drains well after rain. ",
    "Water the birches early in the morning, and never on leaves. ",
    "Feed the cedars twice a year with compost from the old heap. ",
    "Cut the dogwoods in March, above a bud that points outwards. ",
)
MARKS = ("alders", "birches", "cedars", "dogwoods")
ROSES = "Plant roses."
# By names, because the settings of a model are seen in traces.
TEXTS = {"raw": RAW, "harm first": HARM + "".join(SENTENCES), "harm last": "".join(SENTENCES) + HARM, "roses": ROSES}


class Model(BaseChatModel):
    """Says one text, in pieces when streamed. With `inside`, another model is called to say it."""

    says: str = "raw"
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
            for chunk in Model(says=self.says).stream(messages):
                yield ChatGenerationChunk(message=chunk)
            return
        if kwargs.get("tools") and not isinstance(messages[-1], ToolMessage):
            for args in ('{"pla', 'nt": "rose"}'):
                call = {"name": "water" if "{" in args else None, "args": args, "id": "c" if "{" in args else None}
                yield ChatGenerationChunk(message=AIMessageChunk("", tool_call_chunks=[{**call, "index": 0}]))
        else:
            for word in re.findall(r"(?:\S+\s*){1,3}", "\n".join([TEXTS[self.says]] * self.rows)):
                chunk = AIMessageChunk(word)
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
                async for part in Model(says=self.says).astream(messages):
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


async def _astream(model: Any, value: Any, config: Any) -> list[object]:
    return [chunk async for chunk in model.astream(value, config)]


CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "invoke": lambda model, value, config: model.invoke(value, config),
    "ainvoke": lambda model, value, config: model.ainvoke(value, config),
    "batch": lambda model, value, config: model.batch([value, value], config),
    "abatch": lambda model, value, config: model.abatch([value, value], config),
    "stream": lambda model, value, config: list(model.stream(value, config)),
    "astream": _astream,
}


async def show(call: str, model: Any, config: Any, value: Any = "Hi") -> Any:
    """What the caller gets to see of a model."""
    seen = CALLS[call](model, value, config)
    return await seen if asyncio.iscoroutine(seen) else seen


def told_by(run: Any) -> list[object]:
    below = [told for child in run.child_runs for told in told_by(child)]
    return [run.inputs, run.outputs, run.events, run.extra, run.error, *below]


class Watch:
    """All that handlers and tracers of every kind get to know while it is on."""

    def __init__(self) -> None:
        self.ear = Ear()
        self._client = RecordingClient()
        self._runs: list[object] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        with collect_runs() as collected, tracing_context(enabled=True, client=self._client):
            yield
        self._runs += [told for run in collected.traced_runs for told in told_by(run)]

    def seen(self) -> str:
        assert self.ear.heard
        assert self._client.sent
        assert self._runs
        return repr((self.ear.heard, self._client.sent, self._runs))
