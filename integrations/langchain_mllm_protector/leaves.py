"""The strings in the arguments of tool calls and in structured answers, as texts that a detector can judge.

How strings become texts decides how much is caught, and at what price:

- All in one text thins harm out. With the detector `smollm2-135m` (threshold 0.45) a harmful string of 150 characters
  scored 0.85 alone, 0.19 with 45 harmless characters beside it, and 0.03 with 250.
- Every string alone costs a row each, with the question in every row, and very short texts score unsteadily.

So a string of `ALONE_CHARS` or more is judged alone, whole, for long texts are the detector's business; shorter ones
share texts of up to `PIECE_CHARS`. Of more than `MAX_ALONE` long strings the longest are judged alone and the others
share, and shared texts grow where there would be too many. All rows go into the detector batch of the text that the
strings came with, and the worst counts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from numbers import Number
from typing import Any, Final

from langchain_core.messages import BaseMessage

from langchain_mllm_protector.messages import CALL_BLOCKS, content_text

__all__ = ["ALONE_CHARS", "MAX_ALONE", "PIECE_CHARS", "call_leaves", "leaves", "pieces"]

ALONE_CHARS: Final = 40
"""Characters from which a string is judged alone: about a sentence. Names, dates and numbers are shorter."""

PIECE_CHARS: Final = 200
"""Characters up to which shorter strings share a text: about 50 tokens."""

MAX_ALONE: Final = 64
"""Strings that are judged alone, at most; of shared texts there are at most some twice as many."""

_ARGUMENTS = ("args", "arguments", "input", "partial_json")
# The names that a schema gives. Other keys are the model's own words.
_NAME = re.compile(r"[A-Za-z_][\w-]{0,39}", re.ASCII)


def pieces(texts: Sequence[str]) -> tuple[str, ...]:
    """The texts that are judged: long strings as they are, and then the short ones together, all in their order."""
    too_many = sorted(map(len, texts), reverse=True)[MAX_ALONE : MAX_ALONE + 1]
    alone_chars = max([ALONE_CHARS, *(chars + 1 for chars in too_many)])
    short = [text for text in texts if len(text) < alone_chars]
    shared_chars = max(PIECE_CHARS, sum(len(text) + 1 for text in short) // MAX_ALONE)
    shared: list[str] = []
    for text in short:
        if shared and len(shared[-1]) + 1 + len(text) <= shared_chars:
            shared[-1] += "\n" + text
        else:
            shared.append(text)
    return (*(text for text in texts if len(text) >= alone_chars), *shared)


def leaves(value: object) -> list[str]:
    """Every string in `value` that is not blank, in order, each once.

    It looks into mappings, sequences, sets, dataclasses, pydantic models and all other objects with attributes; of
    messages it takes the text and the arguments of tool calls. Keys count where they are no plain names. Of other
    values, such as dates and paths, it takes what they print; numbers hold no text.
    """
    found: dict[str, None] = {}
    seen: dict[int, object] = {}  # keeps what it has seen alive, so that no id is given twice
    to_see = [value]
    while to_see:
        value = to_see.pop()
        if isinstance(value, (bytes, bytearray)):
            value = value.decode("utf-8", "replace")
        if isinstance(value, str):
            if value.strip():
                found[value] = None
        elif not isinstance(value, Number | None) and id(value) not in seen:
            seen[id(value)] = value
            to_see.extend(reversed(list(_inside(value))))
    return list(found)


def call_leaves(message: BaseMessage) -> list[str]:
    """Every string in the arguments of the tool calls of a message, in order, each once.

    Arguments that are no valid JSON are one string.
    """
    calls: list[Any] = []
    for name in ("tool_calls", "invalid_tool_calls", "tool_call_chunks"):
        calls += getattr(message, name, ())
    if not isinstance(message.content, str):
        calls += [b for b in message.content if isinstance(b, Mapping) and b.get("type") in CALL_BLOCKS]
    kwargs = message.additional_kwargs
    calls += [call.get("function") or call for call in kwargs.get("tool_calls") or ()]
    calls += [kwargs["function_call"]] if kwargs.get("function_call") else []
    return leaves([_parsed(call[name]) for call in calls for name in _ARGUMENTS if name in call])


def _parsed(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, BaseMessage):
        return [content_text(value.content), *call_leaves(value)]
    if isinstance(value, Mapping):
        return [part for key, item in value.items() for part in ((item,) if _is_name(key) else (key, item))]
    if isinstance(value, Enum):
        return [value.value]
    if isinstance(value, (Sequence, Set)):
        return value
    return [_attributes(value) or str(value)]


def _is_name(key: object) -> bool:
    return isinstance(key, str) and _NAME.fullmatch(key) is not None


def _attributes(value: object) -> dict[str, object]:
    held: dict[str, object] = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):  # with slots it has no __dict__
        held |= {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    held |= getattr(value, "__pydantic_extra__", None) or {}
    if isinstance(value, BaseException):
        held["args"] = value.args
    return held
