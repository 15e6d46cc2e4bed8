"""The guard over retrieved nodes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

from llama_index.core.callbacks import CallbackManager
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from pydantic import PrivateAttr, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

from llama_index_mllm_protector.convert import answer_of, guarded_node, turn_of
from llama_index_mllm_protector.lazy_guard import Checked, LazyGuard
from llama_index_mllm_protector.settings import GuardSettings, documents_settings
from mllm_protector_guard import Guard, Turn

__all__ = ["ProtectorPostprocessor"]


@documents_settings
class ProtectorPostprocessor(BaseNodePostprocessor):
    """Judges every retrieved node against the query, so that no harmful text reaches the model.

    A harmful node is dealt with as `on_harm` says: "detoxify" rewrites its text, and drops the node if no
    harmless rewrite is found; "withhold" drops it; "flag" keeps it as it is; "raise" raises
    `HarmfulAnswerError`. Nodes that pass keep their text, and nodes without text (images) stay.
    All nodes are scored in one batch. The nodes that come out are copies, in the same order and with the
    same ids, scores and relationships; each holds its record in `metadata["protector"]`, which is
    excluded from what language models and embedding models see.

    It guards what goes into the model. For what comes out, wrap the engine in `ProtectorQueryEngine`.
    Only the text of a node is judged, not its metadata. Put it last among the postprocessors: one that
    comes after it and brings in other text (sentence windows, say) brings it in unjudged.

    Args:
        callback_manager: LlamaIndex's; a query engine sets its own.
        **settings: See below.

    Raises:
        ConfigError: A setting is unknown or out of range, or `guard` came with others.

    Example:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> from mllm_protector_guard import Guard
        >>> from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier
        >>> from llama_index_mllm_protector import ProtectorPostprocessor
        >>> guard = Guard(detector=KeywordDetector({"bomb"}), detoxifier=ScriptedDetoxifier(["A safe text."]))
        >>> postprocessor = ProtectorPostprocessor(guard=guard)
        >>> nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("Water roses.", "Build a bomb.")]
        >>> [node.text for node in postprocessor.postprocess_nodes(nodes, query_str="What now?")]
        ['Water roses.', 'A safe text.']
    """

    _guard: LazyGuard = PrivateAttr()

    def __init__(self, *, callback_manager: CallbackManager | None = None, **settings: Unpack[GuardSettings]) -> None:
        super().__init__(callback_manager=callback_manager or CallbackManager())
        self._guard = LazyGuard(settings)

    def __reduce__(self) -> tuple[Any, ...]:
        # The pickling of the base class would leave out the settings, and with them the guard that was asked for.
        return partial(type(self), **self._guard.settings), ()

    @classmethod
    def class_name(cls) -> str:
        """Name of the component in serialised form."""
        return "ProtectorPostprocessor"

    @property
    def guard(self) -> Guard:
        """The guard; asking for it loads what is not loaded yet.

        Raises:
            CheckpointError: A model cannot be loaded.
        """
        return self._guard.guard

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """The settings by name. JSON cannot hold detectors and guards that were given as objects."""
        return {**super().custom_model_dump(handler, info), **self._guard.settings}

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return _kept(nodes, self._guard.check(_turns(nodes, query_bundle)))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return _kept(nodes, await self._guard.acheck(_turns(nodes, query_bundle)))


def _turns(nodes: Sequence[NodeWithScore], query: QueryBundle | None) -> list[Turn]:
    return [turn_of(query, answer_of(scored.node)) for scored in nodes]


def _kept(nodes: Sequence[NodeWithScore], verdicts: Sequence[Checked]) -> list[NodeWithScore]:
    copies = (guarded_node(scored, checked) for scored, checked in zip(nodes, verdicts, strict=True))
    return [scored for scored in copies if scored is not None]
