"""`ProtectorMiddleware`: the guard inside a LangChain agent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage, convert_to_messages
from langchain_core.runnables.config import (
    ensure_config,
    get_callback_manager_for_config,
    patch_config,
    var_child_runnable_config,
)

from langchain_mllm_protector.cases import RECORD_KEY
from langchain_mllm_protector.guard import ProtectorGuard
from langchain_mllm_protector.messages import answer_text, content_text, question_messages
from mllm_protector_guard import ConfigError, Guard, MissingDependencyError, Outcome

try:
    from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse, hook_config
    from langchain.agents.middleware.types import ContextT
    from langchain.agents.structured_output import StructuredOutputError
    from langgraph.constants import TAG_NOSTREAM
    from langgraph.types import Command
except ModuleNotFoundError as error:
    raise MissingDependencyError("langchain", "agents") from error

if TYPE_CHECKING:
    from langchain.agents.middleware import ToolCallRequest  # since langchain 1.1
    from langgraph.runtime import Runtime

__all__ = ["TOOL_REFUSAL", "ProtectorMiddleware"]

TOOL_REFUSAL: Final = "The result of this tool call was withheld, because it may be harmful. Go on without it."
"""What stands in the place of a withheld tool result; the model reads it."""

_ToolOutcome = ToolMessage | Command[Any]


class ProtectorMiddleware(AgentMiddleware[AgentState[Any], ContextT]):
    """Lets only harmless answers into an agent: `create_agent(model, tools, middleware=[ProtectorMiddleware()])`.

    Every answer of the model is judged before the agent's state takes it up, as the answer to the last user turn of
    the state with its images. What is harmful is replaced under the same message id; `response_metadata["protector"]`
    holds the record of the check. An answer that cannot be judged is withheld.

    Example:
        >>> from langchain.agents import create_agent
        >>> from langchain_core.language_models import FakeListChatModel
        >>> from langchain_mllm_protector import ProtectorMiddleware
        >>> from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier
        >>> guard = ProtectorMiddleware(
        ...     detector=KeywordDetector({"bomb"}), detoxifier=ScriptedDetoxifier(["Ask me about gardens."])
        ... )
        >>> agent = create_agent(FakeListChatModel(responses=["Build a bomb."]), middleware=[guard])
        >>> agent.invoke({"messages": "What shall I do today?"})["messages"][-1].content
        'Ask me about gardens.'

    **What is covered.** No harmful text of the model reaches the state, its checkpoints, the stream modes `values`,
    `updates`, `messages`, `custom`, `tasks`, `checkpoints` and `debug`, or the stream of events v3. For that the tokens
    of the model are kept out of `messages` (LangGraph's tag `nostream`): the judged answer comes in one piece.

    **What is not.** The run of the model, and that of the guard as its input, still show what the model said: in
    `astream_events` v1 and v2, to callback handlers and to tracers. Where users or logs see these, give the agent a
    guarded model instead (`ProtectedChatModel`). Guard subagents and models in tools, too: they stream on their own.

    **Tool calls.** A message with calls and harmless text keeps its calls. With harmful text, all calls of the
    response go, and so does its structured response: nothing of what was said is carried out. Harm in
    the arguments of a call does the same, and says the refusal. Of a replaced answer nothing stays but the new text,
    usage and neutral metadata.

    **Order.** Put it first among several: it then judges what the others made of the answer, too. What they write into
    the state themselves is theirs to answer for.

    Args:
        guard: A `Guard`, or a `ProtectorGuard` whose settings count; None builds one from `settings`.
        check_input: Judges what the user wrote, once a turn and before anything else runs. The detector gets the text
            of the last user turn as an answer without a question (it was calibrated on answers: try your threshold);
            images are not judged. A harmful input ends the turn with the refusal and stays in the state as
            the user sent it.
        check_tool_results: Judges the text of every tool result as an answer to the last user turn. The place of a
            harmful one takes an error message for the model, `TOOL_REFUSAL`, without artifact and images.
            Other state that a tool writes with a `Command` is not judged.
        settings: Those of `ProtectorGuard`, such as `model`, `threshold` and `on_harm`. Inputs and tool results are
            never rewritten: with `on_harm="detoxify"` they are withheld.

    Attributes:
        guard: Judges the answers; `guard.warm_up()` loads the models now.

    Raises:
        ConfigError: A setting is wrong or unknown, or contradicts `guard`.
    """

    def __init__(
        self,
        *,
        guard: Guard | ProtectorGuard | None = None,
        check_input: bool = False,
        check_tool_results: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not isinstance(guard, ProtectorGuard):
            # The state holds the question: there is nothing to capture.
            guard = ProtectorGuard(**{"guard": guard, "capture": False} | settings)
        elif settings:
            raise ConfigError(
                f"guard= is a ProtectorGuard and contradicts {', '.join(map(repr, settings))}. Set these on it."
            )
        self.guard = guard
        self._input_guard = _withholding(guard, on_missing_question="answer_only") if check_input else None
        self._tool_guard = _withholding(guard, refusal=TOOL_REFUSAL) if check_tool_results else None

    def wrap_model_call(
        self, request: ModelRequest[ContextT], handler: Callable[[ModelRequest[ContextT]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """The model's response with guarded answers.

        Raises:
            HarmfulAnswerError: An answer is harmful and `on_harm` is "raise".
            InferenceError: An answer could not be judged and `on_error` is "raise".
            CheckpointError: A model cannot be loaded.
            StructuredOutputError: A harmless answer is not what the response format asks for.
        """
        failure = None
        with _unstreamed():
            try:
                response = handler(request)
            except StructuredOutputError as error:  # it quotes the answer
                failure, response = error, ModelResponse(result=[error.ai_message])
        cases = _cases(request.state, response.result, AIMessage)
        return _guarded(response, self.guard.batch(cases), failure)

    async def awrap_model_call(
        self,
        request: ModelRequest[ContextT],
        handler: Callable[[ModelRequest[ContextT]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """`wrap_model_call` with the guard's models in a worker thread; the event loop stays free."""
        failure = None
        with _unstreamed():
            try:
                response = await handler(request)
            except StructuredOutputError as error:  # it quotes the answer
                failure, response = error, ModelResponse(result=[error.ai_message])
        cases = _cases(request.state, response.result, AIMessage)
        return _guarded(response, await self.guard.abatch(cases), failure)

    @hook_config(can_jump_to=["end"])
    def before_agent(self, state: AgentState[Any], runtime: Runtime[ContextT]) -> dict[str, Any] | None:
        """The end of the turn with the refusal if the user's text is harmful; does nothing without `check_input`."""
        if self._input_guard is None:
            return None
        return _refused(self._input_guard.invoke(_input(state)))

    @hook_config(can_jump_to=["end"])
    async def abefore_agent(self, state: AgentState[Any], runtime: Runtime[ContextT]) -> dict[str, Any] | None:
        """`before_agent` with the detector in a worker thread."""
        if self._input_guard is None:
            return None
        return _refused(await self._input_guard.ainvoke(_input(state)))

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], _ToolOutcome]
    ) -> _ToolOutcome:
        """The tool's result, withheld if it is harmful; as it is without `check_tool_results`."""
        outcome = handler(request)
        if self._tool_guard is None:
            return outcome
        cases = _cases(request.state, _tool_messages(outcome), ToolMessage)
        return _with_tool_messages(outcome, self._tool_guard.batch(cases))

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[_ToolOutcome]]
    ) -> _ToolOutcome:
        """`wrap_tool_call` with the detector in a worker thread."""
        outcome = await handler(request)
        if self._tool_guard is None:
            return outcome
        cases = _cases(request.state, _tool_messages(outcome), ToolMessage)
        return _with_tool_messages(outcome, await self._tool_guard.abatch(cases))


def _withholding(guard: ProtectorGuard, *, refusal: str | None = None, **changes: Any) -> ProtectorGuard:
    """A guard like `guard` for texts that no model answered: it withholds where `guard` would rewrite."""
    settings = {name: getattr(guard, name) for name in type(guard).model_fields} | changes
    on_harm = guard.on_harm if guard.guard is None else guard.guard.policy.on_harm
    policy: dict[str, Any] = {"on_harm": "withhold" if on_harm == "detoxify" else on_harm}
    if refusal is not None:
        policy["refusal"] = refusal
    if guard.guard is None:
        return ProtectorGuard(**settings | policy)
    return ProtectorGuard(**settings | {"guard": guard.guard.changed(**policy)})


@contextmanager
def _unstreamed() -> Iterator[None]:
    """Keeps the tokens of the model calls inside out of LangGraph's stream mode `messages`."""
    config = ensure_config()
    callbacks = get_callback_manager_for_config(config)
    # Not in config["tags"]: a model that was bound to tags of its own would replace those.
    callbacks.add_tags([TAG_NOSTREAM])
    token = var_child_runnable_config.set(patch_config(config, callbacks=callbacks))
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


def _cases(state: Any, messages: Sequence[BaseMessage], kind: type[BaseMessage]) -> list[dict[str, Any]]:
    """Every message of `kind` as an answer to the last user turn."""
    question = list(question_messages(state["messages"]))
    return [{"question": question, "answer": message} for message in messages if isinstance(message, kind)]


def _input(state: Any) -> dict[str, Any]:
    """What the user wrote, as an answer without a question."""
    text = "\n".join(content_text(message.content) for message in question_messages(state["messages"]))
    return {"question": [], "answer": AIMessage(text)}


def _refused(checked: AIMessage | str) -> dict[str, Any] | None:
    message = cast("AIMessage", checked)
    return {"messages": [message], "jump_to": "end"} if _was_replaced(message) else None


def _guarded(
    response: ModelResponse[Any], checked: Sequence[AIMessage | str], failure: StructuredOutputError | None
) -> ModelResponse[Any]:
    """`response` with the checked answers; `failure` is raised if none of them is harmful."""
    answers = cast("Sequence[AIMessage]", checked)
    if any(map(_was_replaced, answers)):
        return replace(response, result=list(map(_text_alone, answers)), structured_response=None)
    if failure is not None:
        raise failure
    safe = iter(answers)
    return replace(response, result=[next(safe) if isinstance(m, AIMessage) else m for m in response.result])


def _was_replaced(message: BaseMessage) -> bool:
    return message.response_metadata[RECORD_KEY]["outcome"] in (Outcome.DETOXIFIED, Outcome.WITHHELD)


def _text_alone(message: AIMessage) -> AIMessage:
    """The text of a guarded answer without blocks and tool calls."""
    return AIMessage(
        content=answer_text(message),
        id=message.id,
        name=message.name,
        usage_metadata=message.usage_metadata,
        response_metadata=message.response_metadata,
    )


def _each_tool_message(outcome: Any, visit: Callable[[ToolMessage], ToolMessage]) -> Any:
    """What a tool gave, with `visit` done to its messages in order."""
    if isinstance(outcome, ToolMessage):
        return visit(outcome)
    if isinstance(outcome, list):
        return [_each_tool_message(part, visit) for part in outcome]
    if isinstance(outcome, Command) and isinstance(outcome.update, Mapping) and "messages" in outcome.update:
        messages = convert_to_messages(outcome.update["messages"])
        return replace(outcome, update={**outcome.update, "messages": _each_tool_message(messages, visit)})
    return outcome


def _tool_messages(outcome: _ToolOutcome) -> list[ToolMessage]:
    found: list[ToolMessage] = []

    def note(message: ToolMessage) -> ToolMessage:
        found.append(message)
        return message

    _each_tool_message(outcome, note)
    return found


def _with_tool_messages(outcome: _ToolOutcome, checked: Sequence[Any]) -> _ToolOutcome:
    """`outcome` with the checked messages; a withheld one becomes an error."""
    safe = iter(checked)
    return cast("_ToolOutcome", _each_tool_message(outcome, lambda _: _error_if_withheld(next(safe))))


def _error_if_withheld(message: ToolMessage) -> ToolMessage:
    if not _was_replaced(message):
        return message
    return ToolMessage(
        content=answer_text(message),
        id=message.id,
        name=message.name,
        tool_call_id=message.tool_call_id,
        status="error",
        response_metadata=message.response_metadata,
    )
