"""`ProtectedChatModel`: a chat model of which nothing is seen, anywhere, before it was judged."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, closing
from typing import TYPE_CHECKING, Any, cast

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForChainRun,
    AsyncCallbackManagerForLLMRun,
    CallbackManager,
    CallbackManagerForChainRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from pydantic import PrivateAttr, ValidationError

from langchain_mllm_protector.cases import QUESTION_KEY, RECORD_KEY
from langchain_mllm_protector.guard import ProtectorGuard
from langchain_mllm_protector.messages import neutral
from langchain_mllm_protector.owned import Owned
from langchain_mllm_protector.runs import Call, RunWatch, parent_run
from langchain_mllm_protector.settings import faults_of
from langchain_mllm_protector.silence import Silence, silent_astream, silent_stream
from langchain_mllm_protector.wrapped import WrappedChatModel
from mllm_protector_guard import ConfigError, Guard, Outcome

__all__ = ["ProtectedChatModel"]


class ProtectedChatModel(WrappedChatModel):
    """The same chat model, of which only harmless answers are seen: `ProtectedChatModel(model=ChatOpenAI(...))`.

    Takes the place of the model it wraps in chains, graphs and agents. The wrapped model runs unseen; its answer
    leaves when it was judged, together with the question. So callers, token streams, `astream_events`, LangGraph's
    stream modes and checkpoints, callback handlers and tracers get to know what `ProtectorGuard` lets through, and
    nothing else.

    Example:
        >>> from langchain_core.language_models import FakeListChatModel
        >>> from langchain_mllm_protector import ProtectedChatModel, ProtectorGuard
        >>> from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier
        >>> model = ProtectedChatModel(
        ...     model=FakeListChatModel(responses=["Build a bomb."]),
        ...     guard=ProtectorGuard(
        ...         detector=KeywordDetector({"bomb"}), detoxifier=ScriptedDetoxifier(["Ask me about gardens."])
        ...     ),
        ... )
        >>> answer = model.invoke("What shall I do today?")
        >>> answer.content
        'Ask me about gardens.'
        >>> answer.response_metadata["protector"]["outcome"]
        'detoxified'

    **Answers** are judged, rewritten, streamed and recorded as `ProtectorGuard` describes it. The question is always
    known, for it comes with the call: `question_match` is `explicit`. Several generations of one call are judged in
    one batch. Kept are ids, usage, tool calls and metadata; of a harmful answer, what may repeat its text goes, log
    probabilities too.

    **Tools and structured output** are those of the wrapped model: `bind_tools` and `with_structured_output` give what
    it gives, with the guarded model in its place. Call arguments such as `stop` go on to it.

    **Callbacks** see one run of a chat model, with the checks below it. Those that were given to the wrapped model
    itself are not called; give them to this one.

    **Caches** are not used, neither for the answers of the wrapped model, which may be harmful, nor for verdicts.

    Args:
        model: The chat model.
        guard: What decides: a `ProtectorGuard` with settings of your choice, a ready `Guard`, or None for
            `ProtectorGuard()`, which uses the default model.
        streaming: Whether `invoke`, too, asks the model for a stream. As in the wrapped model unless given; so are
            `disable_streaming`, `output_version`, `rate_limiter`, `tags` and `metadata`.

    Raises:
        ConfigError: A setting is wrong or unknown.
    """

    guard: ProtectorGuard | Guard | None = None

    _protector: ProtectorGuard = PrivateAttr()
    _call: Call | None = PrivateAttr(default=None)

    if not TYPE_CHECKING:  # type checkers read the fields instead

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ConfigError(
                    f"ProtectedChatModel cannot be built: {faults_of(error)}. Settings of the guard go into "
                    "guard=ProtectorGuard(...), those of the chat model into model=..., before anything is bound to it."
                ) from error
            self._protector = (
                self.guard
                if isinstance(self.guard, ProtectorGuard)
                else ProtectorGuard(guard=self.guard, capture=False)
            )

    def warm_up(self) -> None:
        """Loads the models of the guard now, not at the first check.

        Raises:
            CheckpointError: A model cannot be loaded.
        """
        self._protector.warm_up()

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """The guarded answer in chunks, while it is written. Closed early, it closes the wrapped model's stream."""
        config = ensure_config(config)
        callbacks = CallbackManager.configure(config.get("callbacks"))
        watch = RunWatch(callbacks)
        with ExitStack() as closing:
            copy = self._for(Call(run=lambda: watch.run, opened=lambda chunks: closing.callback(chunks.close)))
            chunks = BaseChatModel.stream(copy, input, {**config, "callbacks": callbacks}, stop=stop, **kwargs)
            closing.callback(chunks.close)  # type: ignore[attr-defined]  # a generator
            for chunk in chunks:  # noqa: UP028 - `yield from` would close it before what it reads from
                yield chunk

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """`stream` with the guard's models in worker threads."""
        config = ensure_config(config)
        callbacks = AsyncCallbackManager.configure(config.get("callbacks"))
        watch = RunWatch(callbacks)
        async with AsyncExitStack() as closing:
            copy = self._for(
                Call(run=lambda: watch.run, opened=lambda chunks: closing.push_async_callback(chunks.aclose))
            )
            chunks = Owned(BaseChatModel.astream(copy, input, {**config, "callbacks": callbacks}, stop=stop, **kwargs))
            closing.push_async_callback(chunks.aclose)
            async for chunk in chunks:
                yield chunk

    # LangChain may ask for a stream in these two, and does not tell it its run.
    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        copy = self._for(Call(run=lambda: run_manager))
        return BaseChatModel._generate_with_cache(copy, messages, stop, run_manager, **kwargs)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        copy = self._for(Call(run=lambda: run_manager))
        return await BaseChatModel._agenerate_with_cache(copy, messages, stop, run_manager, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with Silence():
            result = self.model._generate(messages, stop=stop, **kwargs)
        run = parent_run(CallbackManagerForChainRun, run_manager)
        size = len(result.generations)
        answers = [_message_of(generation) for generation in result.generations]
        return _result(result, self._protector._guard_all(answers, [run] * size, [_asked(messages)] * size))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with Silence():
            result = await self.model._agenerate(messages, stop=stop, **kwargs)
        run = parent_run(AsyncCallbackManagerForChainRun, run_manager)
        size = len(result.generations)
        answers = [_message_of(generation) for generation in result.generations]
        return _result(result, await self._protector._aguard_all(answers, [run] * size, [_asked(messages)] * size))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call or Call()
        chunks = self._chunks(messages, stop, parent_run(CallbackManagerForChainRun, run_manager or call.run()), kwargs)
        call.opened(chunks)
        return chunks

    def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = self._call or Call()
        run = parent_run(AsyncCallbackManagerForChainRun, run_manager or call.run())
        chunks = Owned(self._achunks(messages, stop, run, kwargs))
        call.opened(chunks)
        return chunks

    def _chunks(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run: CallbackManagerForChainRun,
        kwargs: dict[str, Any],
    ) -> Generator[ChatGenerationChunk]:
        if not self.model._should_stream(async_api=False, **{**kwargs, "stream": True}):
            yield _as_chunk(self._generate(messages, stop, cast("CallbackManagerForLLMRun", run), **kwargs))
            return
        parts = silent_stream(lambda: self.model._stream(messages, stop=stop, **kwargs))
        guarded = self._protector._transform(map(_message_of, parts), run, _asked(messages))
        with closing(parts), closing(guarded):
            for message in guarded:
                yield ChatGenerationChunk(message=cast("AIMessageChunk", message))

    async def _achunks(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run: AsyncCallbackManagerForChainRun,
        kwargs: dict[str, Any],
    ) -> AsyncGenerator[ChatGenerationChunk]:
        if not self.model._should_stream(async_api=True, **{**kwargs, "stream": True}):
            yield _as_chunk(await self._agenerate(messages, stop, cast("AsyncCallbackManagerForLLMRun", run), **kwargs))
            return
        parts = Owned(silent_astream(lambda: self.model._astream(messages, stop=stop, **kwargs)))
        raw = Owned(_message_of(part) async for part in parts)
        guarded = Owned(self._protector._atransform(raw, run, _asked(messages)))
        async with aclosing(parts), aclosing(raw), aclosing(guarded):
            async for message in guarded:
                yield ChatGenerationChunk(message=cast("AIMessageChunk", message))

    def _for(self, call: Call) -> ProtectedChatModel:
        copy = self.model_copy()
        copy._call = call
        return copy


def _asked(messages: list[BaseMessage]) -> RunnableConfig:
    return {"configurable": {QUESTION_KEY: messages}}


def _message_of(generation: ChatGeneration) -> BaseMessage:
    """The message, with all that comes beside it, so that the guard sees it too."""
    metadata = {**(generation.generation_info or {}), **generation.message.response_metadata}
    return generation.message.model_copy(update={"response_metadata": metadata})


def _result(raw: ChatResult, answers: Sequence[AIMessage | str | Exception]) -> ChatResult:
    """The result with the guarded `answers`, or the first error among them."""
    generations = []
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
        generations.append(ChatGeneration(message=cast("AIMessage", answer)))
    outcomes = {generation.message.response_metadata[RECORD_KEY]["outcome"] for generation in generations}
    unchanged = outcomes <= {Outcome.PASSED, Outcome.FLAGGED}
    output = raw.llm_output if unchanged or raw.llm_output is None else neutral(raw.llm_output)
    return ChatResult(generations=generations, llm_output=output)


def _as_chunk(result: ChatResult) -> ChatGenerationChunk:
    """The answer of a model that does not stream, as a stream of one chunk."""
    fields = result.generations[0].message.model_dump(exclude={"type"})
    return ChatGenerationChunk(message=AIMessageChunk(**fields))
