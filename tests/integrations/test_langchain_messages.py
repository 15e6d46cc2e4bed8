"""Messages in and out: what leaves with a replaced text, and which messages are the question."""

import base64

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables.utils import AddableDict

from integrations.langchain_models import SAFE, asked, keyword_guard
from langchain_mllm_protector.messages import merge_stream, question_of

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


# -- the conversation before it ---------------------------------------------------------------------

PHOTO = {"type": "image", "url": "https://a.example/1.png"}
TALK = [
    SystemMessage("Be kind."),
    AIMessage("Hello."),
    HumanMessage([{"type": "text", "text": "Roses?"}, PHOTO]),
    AIMessage("Yes."),
    HumanMessage("How"),
    HumanMessage("high?"),
    AIMessage("", tool_calls=[{"name": "measure", "args": {}, "id": "c"}]),
    ToolMessage("2 m", tool_call_id="c"),
    AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Two metres."}]),
    HumanMessage("Why?"),
    AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "d"}]),
]


@pytest.mark.parametrize(
    ("turns", "text", "photos"),
    [
        (0, "Why?", 0),
        (1, "User: How\nUser: high?\nAssistant: Two metres.\nUser: Why?", 0),
        (2, "User: Roses?\nAssistant: Yes.\nUser: How\nUser: high?\nAssistant: Two metres.\nUser: Why?", 1),
    ],
)
def test_turns_before_the_question(turns: int, text: str, photos: int) -> None:
    question = question_of(TALK, context_turns=turns)
    assert question is not None
    assert (question.text, len(question.images)) == (text, photos)


def test_more_turns_than_there_are_and_none() -> None:
    assert question_of(TALK, context_turns=9) == question_of(TALK, context_turns=2)
    for value in ("How?", HumanMessage("How?"), [SystemMessage("Be kind."), HumanMessage("How?")]):
        question = question_of(value, context_turns=3)
        assert question is not None
        assert question.text == "How?"


def test_other_roles_are_told_apart() -> None:
    talk = [ChatMessage(role=role, content=role) for role in ("user", "assistant", "critic", "user")]
    question = question_of(talk, context_turns=1)
    assert question is not None
    assert question.text == "User: user\nAssistant: assistant\nUser: user"


@pytest.mark.parametrize("path", ["explicit", "captured", "streamed"])
def test_a_guard_with_context_turns_sees_the_conversation(path: str) -> None:
    guard = keyword_guard(context_turns=1)
    plain = keyword_guard()
    chain = FakeListChatModel(responses=["Roses."])
    prompt = [HumanMessage("Tall?"), AIMessage("Yes."), HumanMessage("Why?")]
    for each in (guard, plain):
        if path == "explicit":
            each.invoke({"question": prompt, "answer": "Roses."})
        elif path == "captured":
            (chain | each).invoke(prompt)
        else:
            list((chain | each).stream(prompt))
    assert {turn.question for turn in asked(guard)} == {"User: Tall?\nAssistant: Yes.\nUser: Why?"}
    assert {turn.question for turn in asked(plain)} == {"Why?"}


# -- joining a stream -------------------------------------------------------------------------------


def test_chunks_join() -> None:
    assert merge_stream(["a", "b"]) == "ab"
    assert merge_stream([AIMessageChunk("a", id="1"), AIMessageChunk("b", id="1")]).content == "ab"
    assert merge_stream([{"question": "q"}, {"answer": "a"}, {"context": 1}, {"answer": "b"}]) == {
        "question": "q",
        "answer": "ab",
    }


def test_structured_answers_join_as_langchain_joins_them() -> None:
    assert merge_stream([{"a": "Pl"}, {"a": "Plant"}]) == {"a": "Plant"}
    assert merge_stream([AddableDict(a="Pl"), AddableDict(b=1), AddableDict(a="ant")]) == {"a": "Plant", "b": 1}
    assert merge_stream([[{"a": "Pl"}], [{"a": "Plant"}, {"a": "b"}]]) == [{"a": "Plant"}, {"a": "b"}]


@pytest.mark.parametrize(
    "parts",
    [["a", AIMessageChunk("b")], [AIMessage("a"), AIMessage("b")], [1, 2], [["a"], ["b"]], [{"a": "b"}, ["a"]]],
)
def test_what_does_not_join_is_an_error(parts: list[object]) -> None:
    with pytest.raises(TypeError, match="cannot join"):
        merge_stream(parts)
