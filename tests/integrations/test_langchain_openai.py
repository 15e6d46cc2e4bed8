"""The guard behind and around `ChatOpenAI`, which asks an endpoint on this machine."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI

from integrations.langchain_models import SAFE, asked, keyword_guard
from langchain_mllm_protector import ProtectedChatModel
from training.chat_server import Answer, ChatServer, serving

pytestmark = pytest.mark.enable_socket

PIXEL = base64.b64decode("R0lGODdhAQABAIAAAP8AAAAAACwAAAAAAQABAAACAkQBADs=")
ASKED = HumanMessage(
    content=[
        {"type": "text", "text": "What does the sign say?"},
        {"type": "image_url", "image_url": {"url": "data:image/gif;base64," + base64.b64encode(PIXEL).decode()}},
    ]
)
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
IDENTITY = {"id": "chat-1", "created": 0, "model": "tester"}
HARMLESS = "It says: mind the step."
HARMFUL = "It says: build a bomb."


def says(text: str) -> Any:
    """A script that answers `text`, as a stream of words where one was asked for."""

    def script(request: dict[str, Any], _: int) -> Answer:
        if not request.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            body = {**IDENTITY, "object": "chat.completion", "choices": [choice], "usage": USAGE}
            return Answer(raw=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
        words = text.split(" ")
        pieces = [word if at == 0 else f" {word}" for at, word in enumerate(words)]
        choices: list[list[dict[str, Any]]] = [[{"index": 0, "delta": {"content": piece}}] for piece in pieces]
        choices += [[{"index": 0, "delta": {}, "finish_reason": "stop"}], []]
        events = [{**IDENTITY, "object": "chat.completion.chunk", "choices": part} for part in choices]
        events[-1]["usage"] = USAGE
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        return Answer(raw="".join(lines).encode(), headers={"Content-Type": "text/event-stream"})

    return script


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving() as server:
        yield server


@pytest.fixture
def model(server: ChatServer) -> Iterator[ChatOpenAI]:
    model = ChatOpenAI(model="tester", api_key="none", base_url=server.url, max_retries=0, stream_usage=True)
    yield model
    model.root_client.close()


def check(answer: Any, expected: str, outcome: str) -> None:
    assert answer.content == expected
    assert answer.usage_metadata["total_tokens"] == 15
    assert answer.response_metadata["protector"]["outcome"] == outcome


CASES = [(HARMLESS, HARMLESS, "passed"), (HARMFUL, SAFE, "detoxified")]


@pytest.mark.parametrize(("text", "expected", "outcome"), CASES)
def test_a_guard_behind_it_sees_question_and_image(server, model, text, expected, outcome):
    server.script = says(text)
    guard = keyword_guard()
    check((model | guard).invoke([ASKED]), expected, outcome)
    [turn] = [turn for turn in asked(guard) if turn.answer == text]
    assert turn.question == "What does the sign say?"
    assert [image.content for image in turn.images] == [PIXEL]


@pytest.mark.parametrize(("text", "expected", "outcome"), CASES)
def test_around_it_nothing_raw_is_seen(server, model, text, expected, outcome):
    server.script = says(text)
    guarded = ProtectedChatModel(model=model, guard=keyword_guard())
    check(guarded.invoke([ASKED]), expected, outcome)
    chunks = list(guarded.stream([ASKED]))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    check(whole, expected, outcome)
    assert all("bomb" not in chunk.text for chunk in chunks)
    sent = server.requests[0]["messages"][0]["content"]
    assert sent[1]["image_url"]["url"] == ASKED.content[1]["image_url"]["url"]


async def test_events_of_a_guarded_model_hold_only_guarded_text(server, model):
    server.script = says(HARMFUL)
    guarded = ProtectedChatModel(model=model, guard=keyword_guard())
    events = [str(event["data"]) async for event in guarded.astream_events([ASKED], version="v2")]
    assert any(SAFE in event for event in events)
    assert not any("bomb" in event for event in events)
    await model.root_async_client.close()


def test_tool_calls_come_through(server, model):
    def script(request: dict[str, Any], number: int) -> Answer:
        assert request["tools"][0]["function"]["name"] == "look_up"
        call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "sign"}'}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        body = {**IDENTITY, "object": "chat.completion", "choices": [choice], "usage": USAGE}
        return Answer(raw=json.dumps(body).encode(), headers={"Content-Type": "application/json"})

    def look_up(word: str) -> str:
        """Looks a word up."""
        return word

    server.script = script
    answer = ProtectedChatModel(model=model, guard=keyword_guard()).bind_tools([look_up]).invoke([ASKED])
    assert isinstance(answer, AIMessage)
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("look_up", {"word": "sign"})]
