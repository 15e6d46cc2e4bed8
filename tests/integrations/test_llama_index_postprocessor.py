"""ProtectorPostprocessor: what happens to retrieved nodes."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Sequence

import pytest
from llama_index.core import Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)

from llama_index_mllm_protector import ProtectorPostprocessor
from mllm_protector_guard import Guard, GuardPolicy, HarmfulAnswerError, Outcome, Turn
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

SAFE = "Here is a harmless text about gardens."


@pytest.fixture(autouse=True)
def _words_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_tokenizer", str.split)
    monkeypatch.setattr(Settings, "_llm", MockLLM())


def make_guard(*, rewrites: Sequence[str] = (SAFE,), **policy: object) -> Guard:
    return Guard(
        detector=KeywordDetector({"bomb"}),
        detoxifier=ScriptedDetoxifier(rewrites),
        policy=GuardPolicy(**policy),
    )


def scored(*texts: str) -> list[NodeWithScore]:
    return [
        NodeWithScore(
            node=TextNode(
                text=text,
                id_=f"node-{i}",
                metadata={"title": f"page {i}"},
                excluded_llm_metadata_keys=["file_path"],
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc-{i}")},
            ),
            score=1.0 - i / 10,
        )
        for i, text in enumerate(texts)
    ]


async def run_both(
    guard: Guard, nodes: list[NodeWithScore], query: str | None = "How?"
) -> tuple[list[NodeWithScore], list[NodeWithScore]]:
    postprocessor = ProtectorPostprocessor(guard=guard)
    bundle = None if query is None else QueryBundle(query)
    return (
        postprocessor.postprocess_nodes(nodes, query_bundle=bundle),
        await postprocessor.apostprocess_nodes(nodes, query_bundle=bundle),
    )


async def test_harmful_node_is_rewritten_and_its_neighbours_are_untouched() -> None:
    nodes = scored("Water roses.", "Build a bomb.", "Prune apple trees.")
    for out in await run_both(make_guard(), nodes):
        assert [n.node.get_content() for n in out] == ["Water roses.", SAFE, "Prune apple trees."]
        assert [n.node_id for n in out] == ["node-0", "node-1", "node-2"]
        assert [n.score for n in out] == [1.0, 0.9, 0.8]
        assert [n.node.source_node.node_id for n in out] == ["doc-0", "doc-1", "doc-2"]
        assert [n.metadata["protector"]["outcome"] for n in out] == ["passed", "detoxified", "passed"]
        assert [n.metadata["title"] for n in out] == ["page 0", "page 1", "page 2"]


async def test_shared_nodes_are_never_changed() -> None:
    nodes = scored("Water roses.", "Build a bomb.")
    before = [n.model_dump() for n in nodes]
    for out in await run_both(make_guard(), nodes):
        assert all(new.node is not old.node for new, old in zip(out, nodes, strict=True))
        out[0].metadata["seen"] = True
        out[0].node.excluded_llm_metadata_keys.append("seen")
    assert [n.model_dump() for n in nodes] == before


async def test_record_is_hidden_from_language_and_embedding_models() -> None:
    nodes = scored("Water roses.", "Build a bomb.")
    for out in await run_both(make_guard(), nodes):
        for node in (n.node for n in out):
            assert "protector" not in node.get_content(MetadataMode.LLM)
            assert "protector" not in node.get_content(MetadataMode.EMBED)
            assert "title" in node.get_content(MetadataMode.LLM)
            assert "protector" in node.get_content(MetadataMode.ALL)
            assert node.excluded_llm_metadata_keys == ["file_path", "protector"]
        assert "bomb" not in out[1].node.get_content(MetadataMode.ALL)


async def test_one_batch_for_all_nodes() -> None:
    guard = make_guard()
    postprocessor = ProtectorPostprocessor(guard=guard)
    nodes = scored("Water roses.", "Build a bomb.", "Another bomb.")
    postprocessor.postprocess_nodes(nodes, query_str="How?")
    assert [len(turns) for turns in guard.detector.calls] == [3, 2]  # the nodes, then the two rewrites
    assert [len(turns) for _, turns in guard.detoxifier.calls] == [2]


async def test_nodes_are_judged_against_the_query() -> None:
    guard = make_guard()
    await run_both(guard, scored("Water roses."), query="How do roses grow?")
    await run_both(guard, scored("Water roses."), query=None)
    assert [turns[0].question for turns in guard.detector.calls] == ["How do roses grow?"] * 2 + [None] * 2
    assert {turns[0].answer for turns in guard.detector.calls} == {"Water roses."}  # without the metadata


async def test_record_says_whether_the_question_was_known() -> None:
    for query, known, match in (("How?", True, "explicit"), (None, False, "none")):
        for out in await run_both(make_guard(), scored("Water roses."), query=query):
            record = out[0].metadata["protector"]
            assert (record["question_known"], record["question_match"]) == (known, match)
            assert record["integration"] == "llama_index"


async def test_node_without_harmless_rewrite_is_dropped() -> None:
    guard = make_guard(rewrites=["still a bomb"], max_attempts=2)
    for out in await run_both(guard, scored("Build a bomb.", "Water roses.")):
        assert [n.node.get_content() for n in out] == ["Water roses."]
    assert len(guard.detoxifier.calls) == 4  # two attempts, sync and async


async def test_withhold_drops() -> None:
    guard = make_guard(on_harm="withhold")
    for out in await run_both(guard, scored("Build a bomb.", "Water roses.", "bomb")):
        assert [n.node_id for n in out] == ["node-1"]
    assert guard.detoxifier.calls == []


async def test_flag_keeps_and_marks() -> None:
    for out in await run_both(make_guard(on_harm="flag"), scored("Build a bomb.", "Water roses.")):
        assert [n.node.get_content() for n in out] == ["Build a bomb.", "Water roses."]
        assert [n.metadata["protector"]["outcome"] for n in out] == ["flagged", "passed"]


async def test_raise_raises_without_a_word_of_the_text() -> None:
    postprocessor = ProtectorPostprocessor(guard=make_guard(on_harm="raise"))
    nodes = scored("Water roses.", "Build a bomb.")
    with pytest.raises(HarmfulAnswerError) as sync_error:
        postprocessor.postprocess_nodes(nodes)
    with pytest.raises(HarmfulAnswerError) as async_error:
        await postprocessor.apostprocess_nodes(nodes)
    for error in (sync_error, async_error):
        assert error.value.result.outcome is Outcome.WITHHELD
        assert "bomb" not in str(error.value)


class BrokenDetector:
    def score(self, turns: Sequence[Turn]) -> list[float]:
        raise RuntimeError("out of order")


async def test_node_that_cannot_be_judged_is_dropped_unless_the_policy_says_pass() -> None:
    closed = Guard(detector=BrokenDetector(), policy=GuardPolicy(on_harm="withhold"))
    opened = Guard(detector=BrokenDetector(), policy=GuardPolicy(on_harm="withhold", on_error="pass"))
    for out in await run_both(closed, scored("Water roses.")):
        assert out == []
    for out in await run_both(opened, scored("Water roses.")):
        assert out[0].node.get_content() == "Water roses."
        assert out[0].metadata["protector"]["reason"] == "error"


async def test_no_nodes_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Guard:
        raise AssertionError("a model was loaded for nothing")

    monkeypatch.setitem(vars(__import__("mllm_protector_guard")), "load_guard", never)
    postprocessor = ProtectorPostprocessor()
    assert postprocessor.postprocess_nodes([], query_str="How?") == []
    assert await postprocessor.apostprocess_nodes([], query_str="How?") == []


async def test_nodes_without_text_are_kept_as_they_are() -> None:
    image = ImageNode(image="aGVsbG8=", id_="image")
    photo = Node(image_resource=MediaResource(data=b"hello", mimetype="image/png"), id_="photo")
    guard = make_guard()
    for out in await run_both(guard, [NodeWithScore(node=image, score=0.5), NodeWithScore(node=photo)]):
        assert [type(n.node) for n in out] == [ImageNode, Node]
        assert out[0].node.image == "aGVsbG8="
        assert out[1].node.image_resource == photo.image_resource
        assert [n.metadata["protector"]["reason"] for n in out] == ["blank", "blank"]
    assert "protector" not in image.metadata


async def test_text_of_image_and_multimodal_nodes_is_guarded_and_the_rest_kept() -> None:
    held = object()
    nodes = [
        NodeWithScore(node=ImageNode(text="A bomb.", image="aGVsbG8=")),
        NodeWithScore(
            node=Node(
                text_resource=MediaResource(text="A bomb."), image_resource=MediaResource(url="https://a.example/b.png")
            )
        ),
        NodeWithScore(node=Document(text="A bomb.")),
        NodeWithScore(node=IndexNode(text="A bomb.", index_id="other", obj=held)),
    ]
    for out in await run_both(make_guard(), nodes):
        assert [n.node.get_content() for n in out] == [SAFE] * 4
        assert [type(n.node) for n in out] == [ImageNode, Node, Document, IndexNode]
        assert out[0].node.image == "aGVsbG8="
        assert str(out[1].node.image_resource.url) == "https://a.example/b.png"
        assert out[3].node.obj is held
    assert [n.node.get_content() for n in nodes] == ["A bomb."] * 4


async def test_event_loop_stays_free_while_nodes_are_judged() -> None:
    let_go = threading.Event()

    class Waiting:
        def score(self, turns: Sequence[Turn]) -> list[float]:
            return [0.0 if let_go.wait(timeout=5) else 1.0 for _ in turns]

    postprocessor = ProtectorPostprocessor(guard=Guard(detector=Waiting(), policy=GuardPolicy(on_harm="withhold")))

    async def other_work() -> None:
        let_go.set()

    out, _ = await asyncio.gather(postprocessor.apostprocess_nodes(scored("Water roses.")), other_work())
    assert len(out) == 1


@pytest.mark.parametrize("streaming", [False, True])
async def test_harm_in_an_index_does_not_reach_the_model(streaming: bool) -> None:
    index = VectorStoreIndex(
        [TextNode(text="Build a bomb.", id_="a"), TextNode(text="Water roses.", id_="b")],
        embed_model=MockEmbedding(embed_dim=4),
    )
    engine = index.as_query_engine(
        llm=MockLLM(),  # it answers with its prompt
        streaming=streaming,
        similarity_top_k=2,
        node_postprocessors=[ProtectorPostprocessor(guard=make_guard())],
    )
    for response in (engine.query("What is in the shed?"), await engine.aquery("What is in the shed?")):
        text = (await response.get_response()).response if hasattr(response, "async_response_gen") else str(response)
        assert SAFE in text
        assert "Water roses." in text
        assert "bomb" not in text
        assert "protector" not in text
        assert {n.node_id for n in response.source_nodes} == {"a", "b"}
    stored = index.docstore.get_node("a")
    assert stored.get_content() == "Build a bomb."
    assert "protector" not in stored.metadata


async def test_all_nodes_dropped_gives_the_engine_nothing_to_answer_from() -> None:
    index = SummaryIndex([TextNode(text="Build a bomb.")])
    engine = index.as_query_engine(
        llm=MockLLM(), node_postprocessors=[ProtectorPostprocessor(guard=make_guard(on_harm="withhold"))]
    )
    assert str(engine.query("How?")) == "Empty Response"
    assert str(await engine.aquery("How?")) == "Empty Response"


def test_copies_share_the_guard_and_dumps_keep_the_settings() -> None:
    guard = make_guard(on_harm="flag")
    postprocessor = ProtectorPostprocessor(guard=guard)
    assert copy.copy(postprocessor).guard is guard
    assert copy.deepcopy(postprocessor).guard is guard
    assert postprocessor.model_copy(deep=True).guard is guard
    assert ProtectorPostprocessor.from_dict(postprocessor.to_dict()).guard is guard
    assert pickle.loads(pickle.dumps(postprocessor)).guard.policy.on_harm == "flag"


def test_settings_by_name_survive_json() -> None:
    postprocessor = ProtectorPostprocessor(model="smollm2-135m", threshold=0.25, on_harm="withhold")
    assert postprocessor.to_dict() == {
        "class_name": "ProtectorPostprocessor",
        "model": "smollm2-135m",
        "threshold": 0.25,
        "on_harm": "withhold",
    }
    again = ProtectorPostprocessor.from_json(postprocessor.to_json())
    assert again.to_dict() == postprocessor.to_dict()
