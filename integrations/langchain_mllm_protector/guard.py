"""`ProtectorGuard`: the guard as the last step of a LangChain chain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableConfig

from langchain_mllm_protector.cases import Case, Step, case_of
from langchain_mllm_protector.judging import steps_of
from langchain_mllm_protector.owned import Owned
from langchain_mllm_protector.settings import GuardSettings
from langchain_mllm_protector.streams import StreamOpener, aguard_stream, arelay, guard_stream, relay
from langchain_mllm_protector.tracing import areport, report

__all__ = ["ProtectorGuard"]

_RunManager = CallbackManagerForChainRun | AsyncCallbackManagerForChainRun


class ProtectorGuard(GuardSettings):
    """Lets only harmless answers leave a chain: `chain | ProtectorGuard()`.

    Every answer is scored together with its question. A harmless answer passes unchanged. A harmful one
    is rewritten, the rewrite is scored too, and if no rewrite is harmless a refusal takes its place.
    An answer that cannot be judged is withheld.

    Example:
        >>> from langchain_core.language_models import FakeListChatModel
        >>> from langchain_mllm_protector import ProtectorGuard
        >>> from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier
        >>> model = FakeListChatModel(responses=["Build a bomb."])
        >>> guard = ProtectorGuard(
        ...     detector=KeywordDetector({"bomb"}), detoxifier=ScriptedDetoxifier(["Ask me about gardens."])
        ... )
        >>> answer = (model | guard).invoke("What shall I do today?")
        >>> answer.content
        'Ask me about gardens.'
        >>> answer.response_metadata["protector"]["outcome"]
        'detoxified'

    **Models.** `ProtectorGuard()` uses the default model and fetches it at the first check if it is not
    there yet. Building a guard loads nothing; `warm_up()` loads now. The same models are shared by all
    guards of a process. With `local_files_only=True` nothing is ever fetched.

    **Input and output.** The answer leaves in the type it came in:

    - `str` gives `str`.
    - `AIMessage` or `AIMessageChunk` (content as text or as a list of blocks) gives the same class with the
      same id, name, usage and tool calls; `response_metadata["protector"]` holds the record of the
      check. The content of a passed message is not touched. In a harmful one the text is replaced; image and
      citation blocks stay; reasoning, log probabilities and all other fields that may repeat the text go.
    - A structured answer (pydantic model, dataclass, dict, list: what parsers and `with_structured_output` make)
      gives the same object, or an error: `HarmfulAnswerError` for harm, `DetectorError` where it could not be judged.
    - `{"question": ..., "answer": ...}` gives the guarded answer alone, in the type of `answer`; other keys
      are ignored. To keep the dict: `RunnablePassthrough.assign(answer=ProtectorGuard())`. The
      question may be a str, a message, a prompt value, or a list of messages or content blocks. A structured answer
      with a key "answer" of its own goes in as `{"answer": it}`.

    Anything else is a `TypeError`. What is judged is the text that a reader sees, and each string in the arguments of
    tool calls and in structured answers, invalid calls and odd keys too. Harm there is not rewritten: the message
    leaves without its tool calls and says the refusal, `reason` "harmful_arguments". Not judged: reasoning beside
    a harmless answer, images and audio that the model made.

    **The question** is looked for in this order; the record says in `question_match` how it was found:

    1. in the dict: `explicit`;
    2. in the call: `config={"configurable": {"__protector_question": question}}`: `explicit`;
    3. in the prompts of the chain's own model calls, with no wiring (see `langchain_mllm_protector.capture`):
       `id`, `text` or `ancestor`;
    4. `none`: the answer is judged alone, unless `on_missing_question` says otherwise.

    Out of a list of messages the question is the last human message with its images, as the model got it,
    together with the human messages directly before it. `context_turns` puts turns of the conversation before it.
    Images are decoded up to 20 MiB, never fetched.

    **Streams** are judged while they come in, as `Guard.stream` does it. No text leaves before a verdict that covers
    it; harmless text leaves as it is. On harm no more of the answer leaves, and the rewrite or refusal follows on a
    paragraph of its own. Usage, metadata, the record and the tool calls, judged when they are whole, come with the last
    chunk. Joined, the chunks of a harmless answer are what the model's are. Some answers are held to their end:

    - with `stream="whole"`, all: nothing leaves of an answer whose harm comes late, but users wait for all of it;
    - dicts, messages that are no chunks, and those whose question is not sure before; given per call it is;
    - from the first content on that is not plain text, such as reasoning, images or citations: the rest.

    A reader that leaves early closes the source. The events that the *model* sends of itself (`on_chat_model_stream` in
    `astream_events`, LangGraph's `stream_mode="messages"`) are not the guard's to hold: do not
    show them to users, or wrap the model in a `ProtectedChatModel`. In traces, the input of the guard's run is the
    answer as the model gave it.

    **Batches** (`batch`, `abatch`) are scored in one detector batch.

    **Traces.** Each check sends the custom event `mllm_protector.check` with its record and shows
    child runs `harm_detector` and `detoxifier`. `ProtectorCallbackHandler` writes the records to a sink.
    Records hold no texts unless `trace_content=True`; the record in a message never does.

    Args:
        model: Name of a catalog model, path of a checkpoint or hub id: the source of what is not given below.
        detector: A detector, or name or path of one, in place of the model's own.
        detoxifier: A detoxifier, or name or path of one, in place of the model's own.
        guard: A ready `Guard`. It brings its own models and policy, so no setting of these may be given beside it.
        threshold: Harm scores at or above it are harmful, [0, 1]; None takes the detector's calibrated one.
        on_harm: "detoxify" rewrites, "withhold" sends the refusal, "flag" lets the answer through and marks the
            record, "raise" raises `HarmfulAnswerError`.
        on_error: What happens to answers that could not be judged: "withhold", "raise" or "pass".
        on_missing_question: "answer_only" judges the answer alone, "warn" does so and logs a warning,
            "withhold" sends the refusal, "raise" raises `DetectorError`.
        tool_calls: "judge" judges the arguments of tool calls; "ignore" lets them through unseen.
        context_turns: How many turns, each what a user said and the answers to it, come before the question, which
            then reads "User: ...", "Assistant: ...", "User: ..." in lines. For detectors that know conversations.
        stream: "sentence" judges a stream at its sentence ends, a number after so many tokens, "whole" once, at its
            end. What left before harm came up cannot be called back; but a guard that holds every answer is soon off.
        max_attempts: How many rewrites are tried, 1 to 10.
        timeout_s: Time limit of one check in seconds; None for none.
        refusal: What stands in the place of a withheld answer.
        device: "auto", "cpu", "cuda", "mps", ...
        dtype: "auto", "float32", "bfloat16", ...
        local_files_only: True never fetches anything; None leaves it to the environment.
        trace_content: Whether the records in events and sinks hold the texts themselves.
        capture: Whether questions are captured from model calls. If no guard of the process
            asks for it, nothing is registered with LangChain.
        name: Name of the run in traces.

    Raises:
        ConfigError: A setting is wrong or unknown, or contradicts `guard`.
    """

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """The guarded answer, in the type it came in.

        Raises:
            HarmfulAnswerError: The answer is harmful and `on_harm` is "raise".
            InferenceError: The answer could not be judged and `on_error` is "raise".
            CheckpointError: A model cannot be loaded.
            TypeError: `input` holds no answer that can be judged.
        """
        return self._call_with_config(self._guard_one, input, config, run_type="parser")

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """`invoke` with the models in a worker thread; the event loop stays free."""
        return await self._acall_with_config(self._aguard_one, input, config, run_type="parser")

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """The guarded answers, same order, scored in one detector batch.

        With `return_exceptions=True` an error stands in the place of its answer.
        """
        return self._batch_with_config(
            self._guard_all, inputs, config, return_exceptions=return_exceptions, run_type="parser"
        )

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """`batch` with the models in a worker thread; the event loop stays free."""
        return await self._abatch_with_config(
            self._aguard_all, inputs, config, return_exceptions=return_exceptions, run_type="parser"
        )

    def transform(self, input: Iterator[Any], config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """The guarded answer in chunks, while `input` comes in. Closed early, it closes `input`; raises as `invoke`."""
        with ExitStack() as closing:

            def guarded(
                input: Iterator[Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
            ) -> Iterator[Any]:
                chunks = self._transform(input, run_manager, config)
                closing.callback(chunks.close)  # first of all, so that its run is open when the record is reported
                return chunks

            parts = relay(input)
            run = self._transform_stream_with_config(parts, guarded, config, run_type="parser")
            closing.callback(run.close)  # type: ignore[attr-defined]  # a generator
            closing.callback(parts.close)
            for chunk in run:  # noqa: UP028 - `yield from` would close it first of all
                yield chunk

    async def atransform(
        self, input: AsyncIterator[Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """`transform` with the models in worker threads; the event loop stays free."""
        async with AsyncExitStack() as closing:

            def guarded(
                input: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
            ) -> AsyncIterator[Any]:
                chunks = Owned(self._atransform(input, run_manager, config))
                closing.push_async_callback(chunks.aclose)
                return chunks

            parts = Owned(arelay(input))
            run = Owned(self._atransform_stream_with_config(parts, guarded, config, run_type="parser"))
            closing.push_async_callback(run.aclose)
            closing.push_async_callback(parts.aclose)
            async for chunk in run:
                yield chunk

    def parse(self, text: str) -> Any:
        """The guarded text."""
        return self.invoke(text)

    def parse_with_prompt(self, completion: str, prompt: PromptValue) -> Any:
        """The guarded text, judged as the answer to `prompt`."""
        return self.invoke({"question": prompt, "answer": completion})

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """The first generation, guarded; `partial` makes no difference to how it is judged."""
        first = result[0]
        return self.invoke(first.message if isinstance(first, ChatGeneration) else first.text)

    def _guard_one(self, value: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> Any:
        return _value_or_raise(self._guard_all([value], [run_manager], [config])[0])

    async def _aguard_one(
        self, value: Any, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> Any:
        return _value_or_raise((await self._aguard_all([value], [run_manager], [config]))[0])

    def _guard_all(
        self, values: list[Any], run_manager: list[CallbackManagerForChainRun], config: list[RunnableConfig]
    ) -> list[Any]:
        steps = self._steps(values, run_manager, config)
        for step, manager in zip(steps, run_manager, strict=True):
            if step.record is not None:
                report(step.record, manager)
        return [step.output for step in steps]

    async def _aguard_all(
        self, values: list[Any], run_manager: list[AsyncCallbackManagerForChainRun], config: list[RunnableConfig]
    ) -> list[Any]:
        engine = self.guard or self._loaded
        if engine is None:
            engine = await asyncio.to_thread(self._engine)
        steps = await engine.in_thread(partial(self._steps, values, run_manager, config))
        for step, manager in zip(steps, run_manager, strict=True):
            if step.record is not None:
                await areport(step.record, manager)
        return [step.output for step in steps]

    def _transform(  # type: ignore[override]  # LangChain finds the two further arguments by their names
        self, input: Iterator[Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> Generator[Any]:
        guard_one = partial(self._guard_one, run_manager=run_manager, config=config)
        return guard_stream(input, self._opener(run_manager, config), run_manager, guard_one=guard_one)

    def _atransform(  # type: ignore[override]  # as above
        self, input: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> AsyncGenerator[Any]:
        guard_one = partial(self._aguard_one, run_manager=run_manager, config=config)
        return aguard_stream(input, self._opener(run_manager, config), run_manager, guard_one=guard_one)

    def _opener(self, run_manager: _RunManager, config: RunnableConfig) -> StreamOpener:
        return StreamOpener(
            engine=self._engine,
            mode=self.stream_mode,
            on_missing_question=self.on_missing_question,
            **self._asking(),
            config=config,
            run_manager=run_manager,
        )

    def _steps(
        self, values: Sequence[Any], run_managers: Sequence[_RunManager], configs: Sequence[RunnableConfig]
    ) -> list[Step]:
        """What each run ends with. A value that is no answer is an error in its own place only."""
        engine = self._engine()
        cases: list[Case | TypeError] = []
        for value, manager, config in zip(values, run_managers, configs, strict=True):
            try:
                cases.append(case_of(value, config, run_manager=manager, **self._asking()))
            except TypeError as error:
                cases.append(error)
        return steps_of(engine, cases, on_missing_question=self.on_missing_question)

    def _asking(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("capture", "tool_calls", "context_turns")}


def _value_or_raise(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value
