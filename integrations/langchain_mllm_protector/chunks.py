"""The parts of a streamed answer between their arrival and the verdict: what to judge, and what leaves for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, cast

from langchain_core.messages import AIMessage, AIMessageChunk, merge_content

from langchain_mllm_protector.cases import with_record
from langchain_mllm_protector.leaves import call_leaves
from langchain_mllm_protector.messages import Content, cannot_join, content_text, with_text, without_calls
from mllm_protector_guard import GuardRecord, GuardResult, Outcome

__all__ = ["ChunkAnswer", "TextAnswer", "only_text"]


class TextAnswer:
    """An answer that comes as `str`: what may leave of it leaves as it is."""

    def take(self, part: object) -> str:
        """The text of the next part, to be judged.

        Raises:
            TypeError: It is no `str`.
        """
        if not isinstance(part, str):
            raise cannot_join(("", part))
        return part

    def end(self) -> str:
        """What is left to be judged at the end of the answer: nothing."""
        return ""

    def calls(self) -> list[str]:
        """The strings in the arguments of its tool calls: a `str` calls none."""
        return []

    def leave(self, text: str, *, replaced: bool) -> list[AIMessage | str]:
        """The chunks with which `text` leaves."""
        return [text]

    def last(self, result: GuardResult, record: GuardRecord, *, with_calls: bool) -> list[AIMessage | str]:
        """What follows at the end; a `str` has no place for a record."""
        return []


class ChunkAnswer:
    """An answer that comes as message chunks.

    Text leaves in chunks that hold nothing else. The last chunk holds all the rest: usage, metadata, tool calls, and
    the record. Joined they are what the chunks of the model are when joined.

    Text here is a `str`, or a block with the fields `type`, `text` and `index`, which LangChain joins by its index.
    From the first block of another kind on, content is held to the end: such a block may repeat the text, and its
    place is after the text before it.
    """

    def __init__(self) -> None:
        self._contents: deque[Content] = deque()
        self._other: list[Content] = []  # from the first content on that is more than text
        self._fields: list[AIMessageChunk] = []  # the chunks without their contents
        self._ended = False
        self._left = 0  # characters
        self._id: str | None = None

    def take(self, part: object) -> str:
        """The text of the next part, to be judged; "" for what is held to the end.

        Raises:
            TypeError: It is no `AIMessageChunk`.
        """
        if not isinstance(part, AIMessageChunk):
            raise cannot_join((AIMessageChunk(content=""), part))
        self._fields.append(part.model_copy(update={"content": ""}))
        self._id = self._id or part.id
        content = cast("Content", part.content)
        if self._other or not only_text(content):
            self._other.append(content)
            return ""
        self._contents.append(content)
        return content_text(content)

    def end(self) -> str:
        """The text that was held, to be judged now that the answer has ended."""
        self._ended = True
        return content_text(_merged(self._other)) if self._other else ""

    def calls(self) -> list[str]:
        """The strings in the arguments of its tool calls, which are whole only now that it has ended."""
        return call_leaves(self._chunk(_merged([*self._other, ""])) + self._joined())

    def leave(self, text: str, *, replaced: bool) -> list[AIMessage | str]:
        """The chunks with which `text` leaves; none after the end of the answer, when it leaves with the record."""
        if self._ended:
            return []
        self._left += len(text)
        contents = [_instead(self._contents, text)] if replaced else self._cut(len(text))
        return [self._chunk(run) for run in _runs(contents)]

    def last(self, result: GuardResult, record: GuardRecord, *, with_calls: bool) -> list[AIMessage | str]:
        """All that has not left, with the record on the last chunk; tool calls only if they may leave."""
        fields = self._joined()
        contents = [*self._contents, *([_merged(self._other)] if self._other else [])]
        if result.outcome in (Outcome.DETOXIFIED, Outcome.WITHHELD):
            rest = self._chunk(_merged([*contents, ""])) + fields
            safe = with_text(rest, result.text[self._left :])
            return [with_record(safe if with_calls else without_calls(safe), record)]
        *before, content = _runs(contents) or [""]
        # Added, not copied: LangChain finishes tool calls when it adds the last chunk.
        last = self._chunk(content) + fields
        return [*map(self._chunk, before), with_record(last, record)]

    def _joined(self) -> AIMessageChunk:
        return self._fields[0] + self._fields[1:]

    def _chunk(self, content: Content) -> AIMessageChunk:
        return type(self._fields[0])(content=content, id=self._id)

    def _cut(self, chars: int) -> Iterator[Content]:
        """Takes the contents with the next `chars` characters."""
        while chars > 0:
            head, tail = _split(self._contents.popleft(), chars)
            if tail:
                self._contents.appendleft(tail)
            chars -= len(content_text(head))
            yield head


def only_text(content: str | Sequence[str | Mapping[str, Any]]) -> bool:
    """Whether the content is text that may leave in pieces, and joins again."""
    return isinstance(content, str) or all(
        isinstance(block, Mapping)
        and block.keys() == {"type", "text", "index"}
        and block["type"] == "text"
        and isinstance(block["text"], str)
        and (isinstance(block["index"], int) or str(block["index"]).startswith("lc_"))
        for block in content
    )


def _split(content: Content, chars: int) -> tuple[Content, Content]:
    """The content up to so many characters of its text, and the rest."""
    if isinstance(content, str):
        return content[:chars], content[chars:]
    for position, block in enumerate(content):
        text = content_text([block])
        if chars == 0 and text:
            return content[:position], content[position:]
        if len(text) > chars:
            assert isinstance(block, dict)  # only text, as `only_text` says
            head = [*content[:position], block | {"text": text[:chars]}]
            return head, [block | {"text": text[chars:]}, *content[position + 1 :]]
        chars -= len(text)
    return content, []


def _instead(contents: Sequence[Content], text: str) -> Content:
    """`text` as content of the kind, and in the place, of the first text among `contents`."""
    first = next(content for content in contents if content_text(content))
    if isinstance(first, str):
        return text
    block = next(block for block in first if content_text([block]))
    assert isinstance(block, dict)  # only text, as `only_text` says
    return [block | {"text": text}]


def _runs(contents: Iterator[Content] | Sequence[Content]) -> list[Content]:
    """Contents joined as far as they are of one kind: LangChain joins a mixture from left to right only."""
    return [_merged(list(run)) for _, run in groupby(contents, key=type)]


def _merged(contents: Sequence[Content]) -> Content:
    first, *rest = contents
    # A copy: older releases of langchain-core add to the first list itself.
    return cast("Content", merge_content(first if isinstance(first, str) else [*first], *rest))
