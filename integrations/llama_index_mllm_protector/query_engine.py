"""The guard over the answers of a query engine."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Unpack

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_mllm_protector.convert import answer_of, guarded_response, replaced, turn_of, with_record
from llama_index_mllm_protector.lazy_guard import LazyGuard
from llama_index_mllm_protector.settings import GuardSettings, documents_settings
from mllm_protector_guard import ConfigError, Guard

__all__ = ["ProtectorQueryEngine"]


@documents_settings
class ProtectorQueryEngine(BaseQueryEngine):
    """A query engine whose answers are guarded; use it wherever the engine inside it is used.

    The answer is judged against the user's own question. What passes is unchanged; a harmful answer is
    dealt with as `on_harm` says: "detoxify" rewrites it, and withholds it behind the refusal if no harmless
    rewrite is found; "withhold" withholds it; "flag" lets it through; "raise" raises `HarmfulAnswerError`.
    The type of the response, its source nodes and its metadata stay; the record of the check is
    `response.metadata["protector"]`. `synthesize` and `asynthesize` are guarded like `query` and `aquery`.

    - `StreamingResponse` and `AsyncStreamingResponse` stay streams. The answer is judged when the stream is
      first read, whole, and not a token of it leaves before the verdict; the record is there from then on.
      An answer that passes leaves in the pieces it came in, any other text in one piece.
    - `PydanticResponse`: all strings of the object are judged as one answer. An object is never rewritten
      in part: if it is harmful, "detoxify" does as "withhold", and a plain `Response` that holds the
      refusal takes its place.
    - Only the answer is judged: source nodes and other metadata are those of the engine inside, and so
      are the events and callbacks it sends. `ProtectorPostprocessor` guards the nodes.

    Args:
        query_engine: The engine to guard.
        callback_manager: LlamaIndex's; that of `query_engine` when None.
        **settings: See below.

    Raises:
        ConfigError: A setting is unknown or out of range, `guard` came with others, or `query_engine` is
            not a query engine.

    Example:
        >>> from llama_index.core.query_engine import CustomQueryEngine
        >>> from mllm_protector_guard import Guard
        >>> from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier
        >>> from llama_index_mllm_protector import ProtectorQueryEngine
        >>> class Echo(CustomQueryEngine):
        ...     def custom_query(self, query_str):
        ...         return f"You asked: {query_str}"
        >>> guard = Guard(detector=KeywordDetector({"bomb"}), detoxifier=ScriptedDetoxifier(["Ask about roses."]))
        >>> engine = ProtectorQueryEngine(Echo(), guard=guard)
        >>> response = engine.query("How do I build a bomb?")
        >>> response.response, response.metadata["protector"]["outcome"]
        ('Ask about roses.', 'detoxified')
    """

    def __init__(
        self,
        query_engine: BaseQueryEngine,
        *,
        callback_manager: CallbackManager | None = None,
        **settings: Unpack[GuardSettings],
    ) -> None:
        if not isinstance(query_engine, BaseQueryEngine):
            raise ConfigError(
                f"query_engine takes a query engine, got {type(query_engine).__name__}. "
                "An index gives one with as_query_engine()."
            )
        super().__init__(callback_manager=callback_manager or query_engine.callback_manager)
        self._query_engine = query_engine
        self._guard = LazyGuard(settings)

    @property
    def guard(self) -> Guard:
        """The guard; asking for it loads what is not loaded yet.

        Raises:
            CheckpointError: A model cannot be loaded.
        """
        return self._guard.guard

    @property
    def query_engine(self) -> BaseQueryEngine:
        """The engine inside, unguarded."""
        return self._query_engine

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """The nodes that the engine inside retrieves.

        Raises:
            NotImplementedError: It cannot retrieve.
        """
        return self._query_engine.retrieve(query_bundle)

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """The nodes that the engine inside retrieves.

        Raises:
            NotImplementedError: It cannot retrieve asynchronously.
        """
        aretrieve = getattr(self._query_engine, "aretrieve", None)
        if aretrieve is None:
            raise NotImplementedError(f"{type(self._query_engine).__name__} does not support aretrieve")
        nodes: list[NodeWithScore] = await aretrieve(query_bundle)
        return nodes

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """The guarded answer of the engine inside from the nodes given.

        Raises:
            NotImplementedError: It cannot synthesize.
        """
        response = self._query_engine.synthesize(query_bundle, nodes, additional_source_nodes)
        return self._guarded(query_bundle, response)

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """The guarded answer of the engine inside from the nodes given.

        Raises:
            NotImplementedError: It cannot synthesize.
        """
        response = await self._query_engine.asynthesize(query_bundle, nodes, additional_source_nodes)
        return await self._aguarded(query_bundle, response)

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return self._guarded(query_bundle, self._query_engine.query(query_bundle))

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return await self._aguarded(query_bundle, await self._query_engine.aquery(query_bundle))

    # Prompts go by the names that the engine inside gives them, so that code which tunes it goes on working.

    def _get_prompts(self) -> PromptDictType:
        return self._query_engine._get_prompts()

    def _get_prompt_modules(self) -> PromptMixinType:
        return self._query_engine._get_prompt_modules()

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._query_engine._update_prompts(prompts)

    def _guarded(self, query: QueryBundle, response: RESPONSE_TYPE) -> RESPONSE_TYPE:
        if isinstance(response, (StreamingResponse, AsyncStreamingResponse)):
            return self._guarded_stream(query, response)
        [checked] = self._guard.check([turn_of(query, answer_of(response))], rewrite=isinstance(response, Response))
        return guarded_response(response, checked)

    async def _aguarded(self, query: QueryBundle, response: RESPONSE_TYPE) -> RESPONSE_TYPE:
        if isinstance(response, (StreamingResponse, AsyncStreamingResponse)):
            return self._guarded_stream(query, response)
        turn = turn_of(query, answer_of(response))
        [checked] = await self._guard.acheck([turn], rewrite=isinstance(response, Response))
        return guarded_response(response, checked)

    def _guarded_stream(
        self, query: QueryBundle, inner: StreamingResponse | AsyncStreamingResponse
    ) -> StreamingResponse | AsyncStreamingResponse:
        metadata = None if inner.metadata is None else dict(inner.metadata)
        if isinstance(inner, AsyncStreamingResponse):
            held = dataclasses.replace(inner, metadata=metadata, response_txt=None)
            held.response_gen = self._ajudged_pieces(query, inner, held)
            return held
        kept = dataclasses.replace(inner, metadata=metadata, response_txt=None)
        kept.response_gen = self._judged_pieces(query, inner, kept)
        return kept

    def _judged_pieces(
        self, query: QueryBundle, inner: StreamingResponse, outer: StreamingResponse
    ) -> Generator[str, None, None]:
        pieces = list(inner.response_gen) if inner.response_txt is None else [inner.response_txt]
        [checked] = self._guard.check([turn_of(query, "".join(pieces))])
        outer.metadata = with_record(outer.metadata, checked)
        yield from [checked.result.text] if replaced(checked.result) else pieces

    async def _ajudged_pieces(
        self, query: QueryBundle, inner: AsyncStreamingResponse, outer: AsyncStreamingResponse
    ) -> AsyncGenerator[str, None]:
        pieces = [piece async for piece in inner.async_response_gen()]
        [checked] = await self._guard.acheck([turn_of(query, "".join(pieces))])
        outer.metadata = with_record(outer.metadata, checked)
        for piece in [checked.result.text] if replaced(checked.result) else pieces:
            yield piece
