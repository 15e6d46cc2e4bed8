"""LangChain messages in and out of the guard: questions and answers, held streams, safe copies."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    BaseMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables.utils import AddableDict
from pydantic import BaseModel

from langchain_mllm_protector.images import images_of
from mllm_protector_guard import ImageInput

__all__ = [
    "CALL_BLOCKS",
    "Content",
    "Message",
    "Question",
    "answer_text",
    "cannot_join",
    "content_text",
    "merge_stream",
    "neutral",
    "question_messages",
    "question_of",
    "unpack",
    "with_text",
    "without_calls",
]

CALL_BLOCKS: Final = frozenset(
    {"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "function_call", "input_json_delta"}
    | {"custom_tool_call", "server_tool_call", "server_tool_call_chunk", "server_tool_use"}
)
"""Types of the content blocks that call a tool."""

_REASONING = frozenset({"reasoning", "reasoning_content", "redacted_thinking", "thinking"})
# What may stay beside a replaced text. Everything else goes, because a block of a kind that is not
# known here may repeat the harmful text.
_KEPT_BLOCKS = frozenset(
    {"image", "image_url", "input_image", "citation", "citations"}
    | {kind for kind in CALL_BLOCKS if not kind.startswith("server_")}
)
_KEPT_KWARGS = frozenset({"tool_calls", "function_call"})
_IDENTIFIER = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)

Message = TypeVar("Message", bound=BaseMessage)
Content = str | list[str | dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Question:
    """What was asked, and the images that came with it."""

    text: str
    images: tuple[ImageInput, ...] = ()


def unpack(value: object) -> tuple[object | None, object]:
    """The explicit question (None if there is none) and the answer of a guard's input.

    Raises:
        TypeError: `value` holds no answer that can be judged.
    """
    question = None
    if isinstance(value, Mapping) and "answer" in value:
        question, value = value.get("question"), value["answer"]
    if not (isinstance(value, (str, BaseMessage)) or _is_structured(value)):
        raise TypeError(
            "ProtectorGuard judges a str, an AIMessage, a structured answer (a pydantic model, dataclass, dict or "
            f'list), or a dict with one of them as "answer"; got {type(value).__name__}'
        )
    return question, value


def answer_text(answer: str | BaseMessage) -> str:
    """The text of an answer that is judged: all its text blocks, joined without a gap."""
    return answer if isinstance(answer, str) else content_text(answer.content)


def content_text(content: str | Sequence[str | Mapping[str, Any]]) -> str:
    """The text of a message's content that a reader sees: all its text blocks, joined without a gap."""
    return "".join(_texts(content))


def question_of(value: object, *, context_turns: int = 0) -> Question | None:
    """The question in a str, a message, a prompt value, a list of messages or a list of content blocks.

    With `context_turns`, up to so many turns before it come first, each message on a new line behind its speaker, and
    with the images that users sent:

        User: Which roses climb?
        Assistant: Many do, New Dawn for one.
        User: How high?

    Raises:
        TypeError: `value` is none of these.
    """
    if isinstance(value, str):
        return Question(text=value)
    messages = (value,) if isinstance(value, BaseMessage) else question_messages(_as_messages(value), context_turns)
    if not messages:
        return None
    asking = messages if len(messages) == 1 else question_messages(messages)
    context = messages[: -len(asking)]
    images = [image for message in messages if not _is_assistant(message) for image in images_of(message.content)]
    text = "\n".join(text for message in asking for text in _texts(message.content))
    told = [(message, content_text(message.content)) for message in context]
    lines = [f"{'Assistant' if _is_assistant(message) else 'User'}: {said}" for message, said in told if said]
    return Question(text="\n".join([*lines, f"User: {text}"]) if lines else text, images=tuple(images))


def question_messages(messages: Sequence[BaseMessage], context_turns: int = 0) -> tuple[BaseMessage, ...]:
    """The messages that ask: the last human message, with the human messages directly before it.

    Without any human message it is the last one that is not an answer or a tool's output. With `context_turns` the
    human messages and answers of so many turns come before them; a turn begins where a human takes the word.
    """
    humans = [_is_human(message) for message in messages]
    if True not in humans:
        asking = [message for message in messages if not isinstance(message, (AIMessage, ToolMessage, FunctionMessage))]
        return tuple(asking[-1:])
    end = len(humans) - humans[::-1].index(True)
    begins = [place for place in range(end) if humans[place] and not (place and humans[place - 1])]
    start = begins[-1]
    context = messages[begins[-1 - min(context_turns, len(begins) - 1)] : start]
    said = [message for message in context if _is_human(message) or _is_assistant(message)]
    return (*said, *messages[start:end])


def merge_stream(parts: Sequence[object]) -> object:
    """One guard input out of the chunks of a stream.

    Raises:
        TypeError: The chunks cannot be joined.
    """
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, str) for part in parts):
        return "".join(part for part in parts if isinstance(part, str))
    chunks = [part for part in parts if isinstance(part, BaseMessageChunk)]
    if len(chunks) == len(parts):
        return chunks[0] + chunks[1:]
    dicts = [part for part in parts if isinstance(part, Mapping)]
    if len(dicts) == len(parts) and any("answer" in part for part in dicts):
        by_key = {key: [d[key] for d in dicts if d.get(key) is not None] for key in ("question", "answer")}
        return {key: merge_stream(values) for key, values in by_key.items() if values}
    sums = [part for part in parts if isinstance(part, AddableDict)]
    if len(sums) == len(parts):
        return sum(sums[1:], start=sums[0])
    if len({type(part) for part in parts}) == 1 and _is_snapshot(parts[-1]):
        return parts[-1]
    raise cannot_join(parts)


def cannot_join(parts: Sequence[object]) -> TypeError:
    """The error for a stream of parts of these kinds."""
    kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
    return TypeError(
        f"ProtectorGuard cannot join a stream of {kinds}; stream str, message chunks or structured answers of one kind"
    )


def with_text(message: Message, text: str) -> Message:
    """A copy of a harmful message that says `text` and holds nothing of what was said.

    Kept: id, name, usage, tool calls, image and citation blocks, and metadata that is a number or an
    identifier. Dropped: reasoning, log probabilities, and every block or field of another kind.
    """
    content = text if isinstance(message.content, str) else _replace_text(message.content, text)
    kwargs = {key: value for key, value in message.additional_kwargs.items() if key in _KEPT_KWARGS}
    safe = message.model_copy(
        update={
            "content": content,
            "additional_kwargs": kwargs,
            "response_metadata": neutral(message.response_metadata),
        }
    )
    if safe.__pydantic_extra__:
        safe.__pydantic_extra__.clear()
    return safe


def without_calls(message: Message) -> Message:
    """A copy of `message` that calls no tool."""
    content = message.content
    if not isinstance(content, str):
        content = [b for b in content if isinstance(b, str) or b.get("type") not in CALL_BLOCKS]
    calls = {"tool_calls", "invalid_tool_calls", "tool_call_chunks"} & type(message).model_fields.keys()
    kwargs = {key: value for key, value in message.additional_kwargs.items() if key not in _KEPT_KWARGS}
    return message.model_copy(update={"content": content, "additional_kwargs": kwargs, **{name: [] for name in calls}})


def _is_structured(value: object) -> bool:
    """Whether `value` is an answer in fields; a prompt and a list of messages are none, but hold more than answers."""
    if isinstance(value, (list, tuple)):
        return not any(isinstance(item, BaseMessage) for item in value)
    is_model = isinstance(value, BaseModel) and not isinstance(value, (BaseMessage, PromptValue))
    return is_model or isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _is_snapshot(value: object) -> bool:
    """Whether parsers stream such values as all that they have read so far. A list of `str` may be new items too."""
    return _is_structured(value) and not (isinstance(value, list) and any(isinstance(item, str) for item in value))


def _texts(content: str | Sequence[str | Mapping[str, Any]]) -> list[str]:
    blocks = [content] if isinstance(content, str) else content
    return [text for text in map(_block_text, blocks) if text is not None]


def _block_text(block: str | Mapping[str, Any]) -> str | None:
    """The text of a block that a reader sees; None if it has none."""
    if isinstance(block, str):
        return block
    if block.get("type") in _REASONING:
        return None
    return next((block[key] for key in ("text", "refusal") if isinstance(block.get(key), str)), None)


def _replace_text(blocks: Sequence[str | Mapping[str, Any]], text: str) -> list[str | dict[str, Any]]:
    kept: list[str | dict[str, Any]] = []
    placed = False
    for block in blocks:
        if _block_text(block) is None:
            if isinstance(block, Mapping) and block.get("type") in _KEPT_BLOCKS:
                kept.append(dict(block))
        elif not placed:
            placed = True
            # The index places the block in its stream; without it chunks would not join again.
            places = {} if isinstance(block, str) else {key: block[key] for key in ("id", "index") if key in block}
            kept.append(text if isinstance(block, str) else {"type": "text", "text": text, **places})
    if text and not placed:
        kept.append({"type": "text", "text": text})
    return kept


def neutral(values: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that can hold no text of the answer: numbers, identifiers and dicts of them."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            kept[key] = neutral(value)
        elif _IDENTIFIER.fullmatch(value) if isinstance(value, str) else isinstance(value, int | float | None):
            kept[key] = value
    return kept


def _is_human(message: BaseMessage) -> bool:
    if isinstance(message, ChatMessage):
        return message.role.casefold() in ("human", "user")
    return isinstance(message, HumanMessage)


def _is_assistant(message: BaseMessage) -> bool:
    if isinstance(message, ChatMessage):
        return message.role.casefold() in ("ai", "assistant", "model")
    return isinstance(message, AIMessage)


def _as_messages(value: object) -> list[BaseMessage]:
    if isinstance(value, PromptValue):
        return value.to_messages()
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        if value and all(isinstance(item, Mapping) and "type" in item and "content" not in item for item in value):
            return [HumanMessage(content=[dict(block) for block in value])]
        try:
            return convert_to_messages(value)
        except Exception:
            # Without the cause: its message would show the texts.
            raise TypeError(f"a question of {len(value)} items is not a list of messages or content blocks") from None
    raise TypeError(
        f"a question is a str, a message, a prompt value or a list of messages or content blocks, "
        f"not {type(value).__name__}"
    )
