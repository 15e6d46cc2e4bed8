"""Chat models without weights, and a detector that keeps a diary, for the tests of the LangChain guard."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_mllm_protector import ProtectorGuard
from mllm_protector_guard import GuardRecord, Turn
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

SAFE = "Ask me about gardens."


class ListSink:
    """Keeps the records it gets."""

    def __init__(self) -> None:
        self.records: list[GuardRecord] = []

    def emit(self, record: GuardRecord) -> None:
        self.records.append(record)


def keyword_guard(**settings: Any) -> ProtectorGuard:
    """A guard to which every answer with "bomb" is harmful."""
    settings = {"detector": KeywordDetector({"bomb"}), "detoxifier": ScriptedDetoxifier([SAFE])} | settings
    return ProtectorGuard(**settings)


def asked(guard: ProtectorGuard) -> list[Turn]:
    """Every turn that the guard's detector scored."""
    return [turn for call in guard.detector.calls for turn in call]


class EchoModel(BaseChatModel):
    """Answers "<label> <question>" after a short random while; streams it word by word."""

    label: str = "answer to"
    slow_s: float = 0.0
    fail: bool = False
    on_chunk: Callable[[str], None] = lambda _: None

    @property
    def _llm_type(self) -> str:
        return "echo"

    def _answer(self, messages: Sequence[BaseMessage]) -> str:
        if self.fail:
            raise RuntimeError("the model is down")
        time.sleep(random.random() * self.slow_s)
        content = messages[-1].content
        question = content if isinstance(content, str) else "".join(b.get("text", "") for b in content)
        return f"{self.label} {question}"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(self._answer(messages)))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for word in self._answer(messages).split(" "):
            self.on_chunk(word)
            yield ChatGenerationChunk(message=AIMessageChunk(word + " "))


class DiaryDetector(KeywordDetector):
    """A keyword detector that writes down when it scores and in which thread."""

    def __init__(self, diary: list[str]) -> None:
        super().__init__({"bomb"})
        self.diary = diary
        self.threads: set[int] = set()

    def score(self, turns: Sequence[Turn]) -> list[float]:
        self.diary.append("score")
        self.threads.add(threading.get_ident())
        return super().score(turns)
