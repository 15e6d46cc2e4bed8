"""Messages in and out: what leaves with a replaced text, and the images of a question."""

import base64
import json

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from integrations.langchain_models import SAFE, asked, keyword_guard
from langchain_mllm_protector.messages import MAX_IMAGE_BYTES, merge_stream, question_of
from mllm_protector_guard import ImageInput

PIXEL = base64.b64encode(b"pixels").decode()


def test_nothing_of_a_harmful_answer_is_left_in_the_message() -> None:
    image = {"type": "image", "base64": PIXEL, "mime_type": "image/png"}
    citation = {"type": "citation", "url": "https://a.example", "title": "Gardens"}
    call = {"type": "tool_call", "name": "f", "args": {}, "id": "c"}
    message = AIMessage(
        content=[
            {"type": "reasoning", "reasoning": "they want a bomb", "summary": [{"text": "bomb"}]},
            {"type": "thinking", "thinking": "bomb", "signature": "s"},
            {"type": "reasoning_content", "reasoning_content": {"text": "bomb"}},
            image,
            {"type": "text", "text": "a bomb", "annotations": [{"cited_text": "bomb"}], "id": "t-1", "index": 2},
            {"type": "refusal", "refusal": "no bomb"},
            "one more bomb",
            {"type": "output_text", "text": "bomb"},
            {"type": "executable_code", "executable_code": "bomb()"},
            {"type": "server_tool_result", "output": "bomb"},
            {"type": "non_standard", "value": {"text": "bomb"}},
            {"type": "audio", "transcript": "bomb", "base64": PIXEL},
            citation,
            call,
        ],
        additional_kwargs={
            "reasoning_content": "bomb",
            "audio": {"transcript": "bomb"},
            "parsed": {"x": "bomb"},
            "tool_calls": [{"id": "c"}],
        },
        response_metadata={
            "logprobs": {"content": [{"token": "bomb"}]},
            "message": {"content": "build a bomb"},
            "grounding": {"segments": [{"text": "bomb"}]},
            "model_name": "vendor/model-1:2",
            "finish_reason": "stop",
            "created": 17,
        },
        tool_calls=[{"name": "f", "args": {}, "id": "c"}],
        copied="bomb",
    )
    out = keyword_guard().invoke(message)
    assert "bomb" not in out.model_dump_json()
    assert "bomb" not in repr(out)
    assert out.content == [image, {"type": "text", "text": SAFE, "id": "t-1", "index": 2}, citation, call]
    assert out.additional_kwargs == {"tool_calls": [{"id": "c"}]}
    metadata = dict(out.response_metadata)
    metadata.pop("protector")
    assert metadata == {
        "logprobs": {},
        "message": {},
        "grounding": {},
        "model_name": "vendor/model-1:2",
        "finish_reason": "stop",
        "created": 17,
    }
    assert "bomb" in message.model_dump_json()
    assert message.copied == "bomb"


def test_a_refusal_block_is_judged_as_text() -> None:
    guard = keyword_guard()
    guard.invoke(AIMessage(content=[{"type": "refusal", "refusal": "I will not."}]))
    assert asked(guard)[0].answer == "I will not."


def test_other_roles_keep_their_class() -> None:
    out = keyword_guard().invoke(ChatMessage(role="assistant", content="a bomb"))
    assert (type(out), out.role, out.content) == (ChatMessage, "assistant", SAFE)


# -- the question -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("How?", "How?"),
        (HumanMessage("How?"), "How?"),
        ([SystemMessage("Be kind."), HumanMessage("Old?"), AIMessage("Yes."), HumanMessage("How?")], "How?"),
        ([HumanMessage("Look."), HumanMessage("How?")], "Look.\nHow?"),
        ([HumanMessage("How?"), AIMessage("", tool_calls=[]), ToolMessage("found", tool_call_id="c")], "How?"),
        ([SystemMessage("Write a poem.")], "Write a poem."),
        ([ChatMessage(role="user", content="How?"), AIMessage("x")], "How?"),
        ([("human", "How?")], "How?"),
        ([{"role": "user", "content": "How?"}], "How?"),
        ([{"type": "text", "text": "Look."}, {"type": "text", "text": "How?"}], "Look.\nHow?"),
        (HumanMessage([{"type": "text", "text": "Look."}, "How?"]), "Look.\nHow?"),
    ],
)
def test_the_question_of(value: object, text: str) -> None:
    question = question_of(value)
    assert question is not None
    assert question.text == text


def test_no_question_in_answers_alone() -> None:
    assert question_of([AIMessage("x"), ToolMessage("y", tool_call_id="c")]) is None
    assert question_of([]) is None


@pytest.mark.parametrize(
    ("block", "image"),
    [
        (
            {"type": "image", "base64": PIXEL, "mime_type": "image/png"},
            ImageInput(content=b"pixels", media_type="image/png"),
        ),
        (
            {"type": "image", "source_type": "base64", "data": PIXEL, "mime_type": "image/png"},
            ImageInput(content=b"pixels", media_type="image/png"),
        ),
        ({"type": "image", "url": "https://a.example/i.png"}, ImageInput(url="https://a.example/i.png")),
        ({"type": "image", "file_id": "f-1"}, ImageInput(url="file-id:f-1")),
        (
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{PIXEL}"}},
            ImageInput(content=b"pixels", media_type="image/jpeg"),
        ),
        (
            {"type": "image_url", "image_url": f"data:image/jpeg;base64,{PIXEL}"},
            ImageInput(content=b"pixels", media_type="image/jpeg"),
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://a.example/i.png"}},
            ImageInput(url="https://a.example/i.png"),
        ),
        (
            {"type": "input_image", "image_url": f"data:image/gif;base64,{PIXEL}"},
            ImageInput(content=b"pixels", media_type="image/gif"),
        ),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/webp", "data": PIXEL}},
            ImageInput(content=b"pixels", media_type="image/webp"),
        ),
        (
            {"type": "image", "source": {"type": "url", "url": "https://a.example/i.png"}},
            ImageInput(url="https://a.example/i.png"),
        ),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,not base64!"}},
            ImageInput(url="data:image/png;base64,not base64!", media_type="image/png"),
        ),
    ],
)
def test_images_of_the_question(block: dict[str, object], image: ImageInput) -> None:
    question = question_of(HumanMessage([{"type": "text", "text": "What is it?"}, block]))
    assert question is not None
    assert question.text == "What is it?"
    assert question.images == (image,)


def test_a_huge_image_stays_undecoded_and_is_not_lost() -> None:
    encoded = "A" * (MAX_IMAGE_BYTES * 4 // 3 + 8)
    question = question_of(HumanMessage([{"type": "image", "base64": encoded, "mime_type": "image/png"}]))
    assert question is not None
    assert question.images[0].content is None
    assert question.images[0].url == f"data:image/png;base64,{encoded}"


def test_images_reach_the_detector_and_the_count_the_record() -> None:
    guard = keyword_guard()
    question = HumanMessage(
        [{"type": "text", "text": "And?"}, {"type": "image_url", "image_url": {"url": "https://a.example/i.png"}}]
    )
    out = guard.invoke({"question": [question], "answer": AIMessage("Roses.")})
    assert asked(guard)[0].images == (ImageInput(url="https://a.example/i.png"),)
    assert out.response_metadata["protector"]["images"] == 1
    assert "a.example" not in json.dumps(out.response_metadata)


# -- joining a stream -------------------------------------------------------------------------------


def test_chunks_join() -> None:
    assert merge_stream(["a", "b"]) == "ab"
    assert merge_stream([AIMessageChunk("a", id="1"), AIMessageChunk("b", id="1")]).content == "ab"
    assert merge_stream([{"question": "q"}, {"answer": "a"}, {"context": 1}, {"answer": "b"}]) == {
        "question": "q",
        "answer": "ab",
    }


@pytest.mark.parametrize("parts", [["a", AIMessageChunk("b")], [AIMessage("a"), AIMessage("b")], [1, 2]])
def test_what_does_not_join_is_an_error(parts: list[object]) -> None:
    with pytest.raises(TypeError, match="cannot join"):
        merge_stream(parts)
