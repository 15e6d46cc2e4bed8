"""LangChain's own tests for chat models, run on a guarded one."""

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, ClassVar

import httpx
import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import BaseModel

from integrations.langchain_models import SAFE, keyword_guard
from langchain_mllm_protector import ProtectedChatModel

ANSWER = "Hello, what shall we plant?"


class StandardModel(BaseChatModel):
    """Answers politely, calls the first tool it is offered, and writes JSON when bound to."""

    model_name: str = "standard-1"
    temperature: float | None = None
    max_tokens: int | None = None
    timeout: float | None = None
    stop: list[str] | None = None
    max_retries: int | None = None
    api_key: str | None = None
    setup: str = "Why do cats sit?"

    @property
    def _llm_type(self) -> str:
        return "standard"

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any]],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[Any, AIMessage]:
        offered = [convert_to_openai_tool(tool) for tool in tools]
        return self.bind(tools=offered, tool_choice=tool_choice, **kwargs)

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[Any, Any]:
        if kwargs.get("method") != "json_mode":
            return super().with_structured_output(schema, **kwargs)
        parser = PydanticOutputParser(pydantic_object=schema) if isinstance(schema, type) else JsonOutputParser()
        return self.bind(response_format={"type": "json_object"}) | parser

    def _message(self, messages: list[BaseMessage], **kwargs: Any) -> AIMessage:
        name = kwargs.get("model", self.model_name)
        facts: dict[str, Any] = {
            "response_metadata": {"model_name": name},
            "usage_metadata": {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5},
        }
        if "response_format" in kwargs:
            return AIMessage(json.dumps({"setup": self.setup, "punchline": "They can."}), **facts)
        tools = [tool["function"] for tool in kwargs.get("tools", [])]
        if not tools or isinstance(messages[-1], ToolMessage):
            return AIMessage(ANSWER, **facts)
        tool = next((tool for tool in tools if tool["name"] == kwargs.get("tool_choice")), tools[0])
        values = {"integer": 3, "string": str(messages[-1].text)}
        properties = tool["parameters"]["properties"]
        args = {key: values.get(field.get("type"), "any") for key, field in properties.items()}
        call = {"name": tool["name"], "args": args, "id": "call-1", "type": "tool_call"}
        return AIMessage("", tool_calls=[call], **facts)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._message(messages, **kwargs))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        message = self._message(messages, **kwargs)
        for word in re.findall(r"\S+\s*", message.text):
            yield ChatGenerationChunk(message=AIMessageChunk(word))
        for call in message.tool_calls:
            args = json.dumps(call["args"], ensure_ascii=False)
            begin = {"name": call["name"], "args": args[:1], "id": call["id"], "index": 0}
            rest = {"name": None, "args": args[1:], "id": None, "index": 0}
            for part in (begin, rest):
                yield ChatGenerationChunk(message=AIMessageChunk("", tool_call_chunks=[part]))
        last = AIMessageChunk(
            "",
            response_metadata=message.response_metadata,
            usage_metadata=message.usage_metadata,
            chunk_position="last",
        )
        yield ChatGenerationChunk(message=last)

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream(messages, stop, **kwargs):
            yield chunk


class GuardedStandardModel(ProtectedChatModel):
    """Takes the parameters of the wrapped model, as the tests give them."""

    def __init__(self, **parameters: Any) -> None:
        super().__init__(model=StandardModel(**parameters), guard=keyword_guard(capture=False))


class GuardedModel:
    """What both suites are run on.

    Skipped by the suites themselves: `test_init_from_env`, for the guarded model reads no environment variable;
    `test_serdes`, for a model that is no part of LangChain's own packages cannot be loaded by name, and a guard holds
    its models; `test_stream_time`, which measures recorded traffic.
    """

    chat_model_class = GuardedStandardModel
    chat_model_params: ClassVar[dict[str, Any]] = {}
    supports_json_mode = True
    supports_image_inputs = True
    supports_image_urls = True
    supports_image_tool_message = True
    supports_pdf_inputs = True
    supports_pdf_tool_message = True
    supports_audio_inputs = True
    supports_anthropic_inputs = True
    supports_model_override = True
    model_override_value = "standard-2"


class TestGuardedModelAsUnit(GuardedModel, ChatModelUnitTests):
    pass


class TestGuardedModelAsIntegration(GuardedModel, ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def files_without_a_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LANGCHAIN_TESTS_USER_AGENT", "tests")
        monkeypatch.setattr(httpx, "get", lambda url, **kwargs: httpx.Response(200, content=b"a file"))


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str


def test_an_agent_with_a_response_format() -> None:
    agent = create_agent(GuardedStandardModel(), response_format=Joke)
    assert agent.invoke({"messages": ["Tell me a joke about cats."]})["structured_response"].setup


def test_harm_in_structured_text_does_not_get_out() -> None:
    model = GuardedStandardModel(setup="How to build a bomb of zumblot?")
    with pytest.raises(OutputParserException) as raised:
        model.with_structured_output(Joke, method="json_mode").invoke("Tell me a joke about cats.")
    assert SAFE in str(raised.value)
    assert "zumblot" not in str(raised.value)
