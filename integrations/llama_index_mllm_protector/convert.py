"""LlamaIndex's nodes and responses to turns, and verdicts back to nodes and responses.

Nothing that comes in is ever changed: nodes are shared with indexes, and responses may be cached.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Set
from enum import Enum
from typing import Any

from llama_index.core.base.response.schema import PydanticResponse, Response
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from pydantic import BaseModel

from llama_index_mllm_protector.lazy_guard import Checked
from mllm_protector_guard import ConfigError, GuardResult, ImageInput, Outcome, Turn

__all__ = ["RECORD_KEY", "answer_of", "guarded_node", "guarded_response", "replaced", "turn_of", "with_record"]

RECORD_KEY = "protector"
"""Where nodes and responses hold the record in their metadata."""


def turn_of(query: QueryBundle | None, answer: str) -> Turn:
    """The turn of an answer, or of the text of a node; without a query the question is unknown."""
    if query is None:
        return Turn(answer=answer)
    images = (ImageInput(url=query.image_path),) if query.image_path else ()
    return Turn(question=query.query_str, answer=answer, images=images)


def answer_of(value: BaseNode | Response | PydanticResponse) -> str:
    """The text to judge: of a node without its metadata, of a pydantic object all its strings, a line each.

    Raises:
        ConfigError: It is none of the three, so there would be nothing to judge.
    """
    match value:
        case BaseNode():
            return value.get_content(metadata_mode=MetadataMode.NONE)
        case Response():
            return value.response or ""
        case PydanticResponse():
            return "\n".join(_texts(value.response))
    raise ConfigError(
        f"the query engine returned {type(value).__name__}, which cannot be judged; it must return "
        "Response, PydanticResponse, StreamingResponse or AsyncStreamingResponse"
    )


def replaced(result: GuardResult) -> bool:
    """Whether another text stands in the place of the one that was judged."""
    return result.outcome in (Outcome.DETOXIFIED, Outcome.WITHHELD)


def with_record(metadata: Mapping[str, Any] | None, checked: Checked) -> dict[str, Any]:
    """A copy of the metadata that holds the record."""
    return {**(metadata or {}), RECORD_KEY: checked.record}


def guarded_node(scored: NodeWithScore, checked: Checked) -> NodeWithScore | None:
    """A copy of the node with the record and the text that may leave; None if it is withheld."""
    if checked.result.outcome is Outcome.WITHHELD:
        return None
    node = scored.node.model_copy(
        update={
            "metadata": with_record(scored.node.metadata, checked),
            "excluded_llm_metadata_keys": [*scored.node.excluded_llm_metadata_keys, RECORD_KEY],
            "excluded_embed_metadata_keys": [*scored.node.excluded_embed_metadata_keys, RECORD_KEY],
        }
    )
    if replaced(checked.result):
        node.set_content(checked.result.text)
    return scored.model_copy(update={"node": node})


def guarded_response(response: Response | PydanticResponse, checked: Checked) -> Response | PydanticResponse:
    """A copy of the response with the record and the text that may leave.

    A pydantic object leaves whole or not at all: if it may not leave, a plain `Response` takes its place.
    """
    metadata = with_record(response.metadata, checked)
    if not replaced(checked.result):
        return dataclasses.replace(response, metadata=metadata)
    if isinstance(response, PydanticResponse):
        return Response(checked.result.text, source_nodes=response.source_nodes, metadata=metadata)
    return dataclasses.replace(response, response=checked.result.text, metadata=metadata)


def _texts(value: object) -> Iterator[str]:
    """Every string in a pydantic object, keys of its mappings and bytes included."""
    match value:
        case Enum():
            yield from _texts(value.value)
        case str():
            yield value
        case bytes() | bytearray():
            yield value.decode("utf-8", "replace")
        case BaseModel():
            for _, item in value:
                yield from _texts(item)
        case Mapping():
            for key, item in value.items():
                yield from _texts(key)
                yield from _texts(item)
        case list() | tuple() | Set():
            for item in value:
                yield from _texts(item)
        case _ if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from _texts(getattr(value, field.name))
