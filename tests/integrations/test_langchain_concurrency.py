"""Many calls at once and one after the other: no question goes to another's answer, and nothing is left behind."""

import asyncio
import gc
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from integrations.langchain_models import SAFE, EchoModel, asked, keyword_guard
from langchain_mllm_protector import ProtectedChatModel, ProtectorGuard, capture

CALLS = 200
ROWS = "".join(f"Sentence {number} is about the roses that grow in the yard. " for number in range(9))


@pytest.fixture(autouse=True)
def _nothing_stays_in_the_capture() -> Iterator[None]:
    before = capture.CAPTURE.open_runs
    yield
    gc.collect()
    assert capture.CAPTURE.open_runs == before


def chains(guard: ProtectorGuard) -> list[Any]:
    """The guard with a question that is captured, given, given per call, and known to a guarded model."""
    model, text = EchoModel(slow_s=0.004), StrOutputParser()

    def per_call(question: str, config: Any) -> Any:
        given = {**config, "configurable": {"__protector_question": question}}
        return guard.invoke(model.invoke(question), given)

    return [
        model | guard | text,
        {"question": RunnablePassthrough(), "answer": model} | guard | text,
        RunnableLambda(per_call) | text,
        ProtectedChatModel(model=model, guard=guard) | text,
    ]


def ways(chain: Any, question: str) -> list[Callable[[], Any]]:
    """The ways to call a chain; every second is asynchronous."""

    async def astream() -> str:
        return "".join([chunk async for chunk in chain.astream(question)])

    async def abatch() -> str:
        return (await chain.abatch([question]))[0]

    return [
        lambda: chain.invoke(question),
        lambda: chain.ainvoke(question),
        lambda: "".join(chain.stream(question)),
        astream,
        lambda: chain.batch([question])[0],
        abatch,
    ]


async def test_two_hundred_mixed_calls_at_once_keep_each_question_with_its_answer() -> None:
    guard = keyword_guard()
    kinds = chains(guard)
    questions = [f"{'bomb' if number % 3 == 0 else 'rose'} {number}" for number in range(CALLS)]
    loop = asyncio.get_running_loop()

    async def answer(number: int, threads: ThreadPoolExecutor) -> str:
        chain = kinds[number % len(kinds)]
        kind = ways(chain, questions[number])
        at = number // len(kinds) % len(kind)
        if at % 2:
            return await kind[at]()
        return await loop.run_in_executor(threads, kind[at])

    with ThreadPoolExecutor(24) as threads:
        answers = await asyncio.gather(*[answer(number, threads) for number in range(CALLS)])
    expected = [SAFE if "bomb" in question else f"answer to {question}" for question in questions]
    assert [text.strip() for text in answers] == expected
    judged = {(turn.question, turn.answer.strip()) for turn in asked(guard) if turn.answer != SAFE}
    assert judged == {(question, f"answer to {question}") for question in questions}
    rewritten = {turn.question for turn in asked(guard) if turn.answer == SAFE}
    assert rewritten == {question for question in questions if "bomb" in question}


def one_chain(memory: capture.PromptCapture, question: str) -> str | None:
    """What LangChain tells a handler of `model | guard`, and the question that the guard finds."""
    root, model, guard = uuid4(), uuid4(), uuid4()
    memory.on_chain_start({}, {}, run_id=root)
    memory.on_chat_model_start({}, [[HumanMessage(question)]], run_id=model, parent_run_id=root)
    answer = AIMessage("roses", id=f"run--{model}")
    memory.on_llm_end(LLMResult(generations=[[ChatGeneration(message=answer)]]), run_id=model)
    memory.on_chain_start({}, {}, run_id=guard, parent_run_id=root)
    found, _ = memory.find(guard, answer)
    memory.on_chain_end({}, run_id=guard)
    memory.on_chain_end({}, run_id=root)
    return None if found is None else found.text


@pytest.mark.slow
def test_twenty_thousand_calls_leave_the_capture_as_small_as_it_was() -> None:
    memory = capture.PromptCapture()

    def bytes_after(calls: int) -> int:
        for number in range(calls):
            question = f"question {number} " + "about roses " * 20
            assert one_chain(memory, question) == question
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = bytes_after(50)
        after = bytes_after(20_000)
    finally:
        tracemalloc.stop()
    assert memory.open_runs == 0
    assert after - before < 100_000  # the questions alone are five millions


def test_a_run_of_many_calls_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_CALLS_PER_RUN", 10)
    memory, root, judged = capture.PromptCapture(), uuid4(), uuid4()
    memory.on_chain_start({}, {}, run_id=root)
    calls = [uuid4() for _ in range(25)]
    for number, call in enumerate(calls):
        memory.on_chat_model_start({}, [[HumanMessage(str(number))]], run_id=call, parent_run_id=root)
        memory.on_llm_end(LLMResult(generations=[]), run_id=call)
    memory.on_chain_start({}, {}, run_id=judged, parent_run_id=root)
    found = [memory.find(judged, AIMessage("", id=f"run--{call}")) for call in calls]
    assert [match for _, match in found] == ["ancestor"] * 15 + ["id"] * 10
    assert [question.text for question, _ in found] == ["24"] * 15 + [str(number) for number in range(15, 25)]


def streaming(kind: str) -> Any:
    """A chain that streams its answer sentence by sentence."""
    model = FakeListChatModel(responses=[ROWS])
    return model | keyword_guard() if kind == "guard" else ProtectedChatModel(model=model, guard=keyword_guard())


@pytest.mark.parametrize("kind", ["guard", "wrapped"])
def test_streams_that_are_cancelled_or_half_read_leave_nothing_behind(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    chain, threads = streaming(kind), threading.active_count()

    async def half_read() -> None:
        async with aclosing(chain.astream("q")) as chunks:
            async for chunk in chunks:
                assert chunk.content
                return

    async def dropped() -> None:
        async for _ in chain.astream("q"):
            return

    async def endless(begun: asyncio.Event) -> None:
        async for _ in chain.astream("q"):
            begun.set()
            await asyncio.sleep(60)

    async def cancelled() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(endless(begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def all_at_once() -> None:
        await asyncio.gather(*[leave() for leave in (half_read, dropped, cancelled) for _ in range(10)])
        async with asyncio.timeout(60):  # the event loop closes what was dropped
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.01)

    for _ in range(10):
        chunks = chain.stream("q")
        next(chunks)
        chunks.close()
    asyncio.run(all_at_once())
    assert threading.active_count() == threads
    assert caplog.records == []


@pytest.mark.parametrize("kind", ["guard", "wrapped"])
def test_an_event_loop_that_ends_closes_a_stream_without_complaint(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def leave() -> None:
        async for _ in streaming(kind).astream("q"):
            break

    for _ in range(5):  # a loop closes its generators in any order
        asyncio.run(leave())
    assert caplog.records == []
