"""LangChain messages in and out of the guard: texts, images, held streams, safe copies."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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

from mllm_protector_guard import ImageInput

__all__ = [
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
]

MAX_IMAGE_BYTES = 20 * 2**20
"""Larger images, in bytes, stay undecoded: they reach the guard as their data URL."""

_REASONING = frozenset({"reasoning", "reasoning_content", "redacted_thinking", "thinking"})
# What may stay beside a replaced text. Everything else goes, because a block of a kind that is not
# known here may repeat the harmful text.
_KEPT_BLOCKS = frozenset(
    {"image", "image_url", "input_image", "citation", "citations"}
    | {"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "function_call", "input_json_delta"}
)
_KEPT_KWARGS = frozenset({"tool_calls", "function_call"})
_IDENTIFIER = re.compile(r"[\w.:/@+-]{1,128}", re.ASCII)
_DATA_URL = re.compile(r"data:(?P<media_type>[^;,]*)(?:;[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)

Message = TypeVar("Message", bound=BaseMessage)
Content = str | list[str | dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Question:
    """What was asked, and the images that came with it."""

    text: str
    images: tuple[ImageInput, ...] = ()


def unpack(value: object) -> tuple[object | None, str | BaseMessage]:
    """The explicit question (None if there is none) and the answer of a guard's input.

    Raises:
        TypeError: `value` holds no answer that can be judged.
    """
    question = None
    if isinstance(value, Mapping):
        if "answer" not in value:
            raise TypeError('ProtectorGuard got a dict without "answer"; give {"question": ..., "answer": ...}')
        question, value = value.get("question"), value["answer"]
    if not isinstance(value, (str, BaseMessage)):
        raise TypeError(
            'ProtectorGuard judges a str, an AIMessage, or a dict with one of them as "answer"; '
            f"got {type(value).__name__}. Put the guard before parsers that turn the answer into something else."
        )
    return question, value


def answer_text(answer: str | BaseMessage) -> str:
    """The text of an answer that is judged: all its text blocks, joined without a gap."""
    return answer if isinstance(answer, str) else content_text(answer.content)


def content_text(content: str | Sequence[str | Mapping[str, Any]]) -> str:
    """The text of a message's content that a reader sees: all its text blocks, joined without a gap."""
    return "".join(_texts(content))


def question_of(value: object) -> Question | None:
    """The question in a str, a message, a prompt value, a list of messages or a list of content blocks.

    Raises:
        TypeError: `value` is none of these.
    """
    if isinstance(value, str):
        return Question(text=value)
    messages = (value,) if isinstance(value, BaseMessage) else question_messages(_as_messages(value))
    if not messages:
        return None
    texts = [text for message in messages for text in _texts(message.content)]
    images = [image for message in messages for image in _images(message.content)]
    return Question(text="\n".join(texts), images=tuple(images))


def question_messages(messages: Sequence[BaseMessage]) -> tuple[BaseMessage, ...]:
    """The messages that ask: the last human message, with the human messages directly before it.

    Without any human message it is the last one that is not an answer or a tool's output.
    """
    humans = [_is_human(message) for message in messages]
    if True in humans:
        end = len(humans) - humans[::-1].index(True)
        start = end
        while start > 0 and humans[start - 1]:
            start -= 1
        return tuple(messages[start:end])
    asking = [message for message in messages if not isinstance(message, (AIMessage, ToolMessage, FunctionMessage))]
    return tuple(asking[-1:])


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
    if len(dicts) == len(parts):
        by_key = {key: [d[key] for d in dicts if d.get(key) is not None] for key in ("question", "answer")}
        return {key: merge_stream(values) for key, values in by_key.items() if values}
    raise cannot_join(parts)


def cannot_join(parts: Sequence[object]) -> TypeError:
    """The error for a stream of parts of these kinds."""
    kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
    return TypeError(f"ProtectorGuard cannot join a stream of {kinds}; stream str or message chunks of one kind")


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


def _images(content: str | Sequence[str | Mapping[str, Any]]) -> list[ImageInput]:
    if isinstance(content, str):
        return []
    found = [_image(block) for block in content if isinstance(block, Mapping)]
    return [image for image in found if image is not None]


def _image(block: Mapping[str, Any]) -> ImageInput | None:
    """The image in a block of LangChain, OpenAI or Anthropic; None if it is no image block."""
    kind = block.get("type")
    if kind in ("image_url", "input_image"):
        held = block.get("image_url")
        url = held.get("url") if isinstance(held, Mapping) else held
        return _from_fields({"url": url, "file_id": block.get("file_id")})
    if kind == "image":
        source = block.get("source")
        return _from_fields(source if isinstance(source, Mapping) else block)
    return None


def _from_fields(fields: Mapping[str, Any]) -> ImageInput | None:
    media_type = next((fields[key] for key in ("mime_type", "media_type") if isinstance(fields.get(key), str)), None)
    encoded = next((fields[key] for key in ("base64", "data") if isinstance(fields.get(key), str)), None)
    if encoded is not None:
        return _decoded(encoded, media_type) or ImageInput(
            url=f"data:{media_type or ''};base64,{encoded}", media_type=media_type
        )
    url = fields.get("url")
    if isinstance(url, str):
        return _from_url(url, media_type)
    file_id = next((fields[key] for key in ("file_id", "id") if isinstance(fields.get(key), str)), None)
    # An image that a provider holds has no address; it still counts.
    return None if file_id is None else ImageInput(url=f"file-id:{file_id}", media_type=media_type)


def _from_url(url: str, media_type: str | None) -> ImageInput:
    match = _DATA_URL.match(url)
    if match is not None:
        media_type = match["media_type"] or media_type
        image = _decoded(url[match.end() :], media_type)
        if image is not None:
            return image
    return ImageInput(url=url, media_type=media_type)


def _decoded(encoded: str, media_type: str | None) -> ImageInput | None:
    if len(encoded) * 3 // 4 > MAX_IMAGE_BYTES:
        return None
    try:
        return ImageInput(content=base64.b64decode(encoded, validate=True), media_type=media_type)
    except (binascii.Error, ValueError):
        return None
