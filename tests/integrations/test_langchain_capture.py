"""The question of an answer, found without wiring."""

import asyncio
import contextvars
import gc
import threading
from uuid import uuid4

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, RunnablePassthrough

from integrations.langchain_models import EchoModel, asked, keyword_guard
from langchain_mllm_protector import ProtectorGuard, capture
from mllm_protector_guard import ImageInput

QUESTIONS = [f"question {i}" for i in range(36)]


def match_of(message: AIMessage) -> str:
    return message.response_metadata["protector"]["question_match"]


def assert_all_asked(guard: ProtectorGuard, questions: list[str] = QUESTIONS) -> None:
    """Each answer of `EchoModel` was judged with the question it repeats."""
    turns = asked(guard)
    assert sorted(turn.question for turn in turns) == sorted(questions)
    assert all(turn.question in turn.answer.strip() for turn in turns)


CHAINS = {
    "model": lambda guard: EchoModel(slow_s=0.02) | guard,
    "parser": lambda guard: EchoModel(slow_s=0.02) | StrOutputParser() | guard,
    "lambda": lambda guard: EchoModel(slow_s=0.02) | RunnableLambda(lambda m: "Well, " + m.content) | guard,
    "prompt": lambda guard: (
        RunnableLambda(lambda q: {"q": q})
        | ChatPromptTemplate.from_messages([("system", "Be kind."), ("human", "{q}")])
        | EchoModel(slow_s=0.02)
        | guard
    ),
    "nested": lambda guard: (RunnablePassthrough() | (RunnablePassthrough() | EchoModel(slow_s=0.02))) | guard,
    "inner": lambda guard: EchoModel(slow_s=0.02) | (StrOutputParser() | guard),
    "fallback": lambda guard: EchoModel(fail=True).with_fallbacks([EchoModel(slow_s=0.02)]) | guard,
    "bound": lambda guard: EchoModel(slow_s=0.02).bind(stop=["x"]).with_config(run_name="m", callbacks=[]) | guard,
    "retry": lambda guard: EchoModel(slow_s=0.02).with_retry() | guard,
}


@pytest.fixture(params=CHAINS)
def make_chain(request: pytest.FixtureRequest) -> object:
    return CHAINS[request.param]


def test_batch_over_threads(make_chain) -> None:
    guard = keyword_guard()
    make_chain(guard).batch(QUESTIONS, {"max_concurrency": 12})
    assert_all_asked(guard)


def test_map_over_threads_inside_one_root(make_chain) -> None:
    # Each element is a run of its own below one root, so the root alone does not tell them apart.
    guard = keyword_guard()
    (RunnablePassthrough() | make_chain(guard).map()).invoke(QUESTIONS)
    assert_all_asked(guard)


async def test_gather_and_abatch(make_chain) -> None:
    guard = keyword_guard()
    chain = make_chain(guard)
    await asyncio.gather(*(chain.ainvoke(q) for q in QUESTIONS[:12]))
    await chain.abatch(QUESTIONS[12:])
    assert_all_asked(guard)


async def test_concurrent_streams(make_chain) -> None:
    guard = keyword_guard()
    chain = make_chain(guard)

    async def drain(question: str) -> None:
        async for _ in chain.astream(question):
            pass

    await asyncio.gather(*(drain(q) for q in QUESTIONS[:24]))
    for question in QUESTIONS[24:]:
        for _ in chain.stream(question):
            pass
    assert_all_asked(guard)


def test_batch_as_completed(make_chain) -> None:
    guard = keyword_guard()
    list(make_chain(guard).batch_as_completed(QUESTIONS[:12], {"max_concurrency": 12}))
    assert_all_asked(guard, QUESTIONS[:12])


def test_two_models_side_by_side_with_different_questions() -> None:
    guard = keyword_guard()
    branch = {
        "a": RunnableLambda(lambda q: q + " for a") | EchoModel(slow_s=0.02),
        "b": RunnableLambda(lambda q: q + " for b") | EchoModel(slow_s=0.02),
    }
    pick: Runnable = RunnableLambda(lambda both: both["a"])
    for parser in (RunnablePassthrough(), StrOutputParser()):
        (RunnableParallel(branch) | pick | parser | guard).batch(["q1", "q2"], {"max_concurrency": 4})
    assert [turn.question for turn in asked(guard)] == ["q1 for a", "q2 for a"] * 2


def test_no_guess_when_models_ran_side_by_side_and_the_text_was_altered() -> None:
    guard = keyword_guard()
    started = threading.Barrier(2)

    def together(question: str) -> str:
        started.wait(timeout=10)
        return question

    class Meeting(EchoModel):
        def _answer(self, messages):  # both calls are open at once
            return together(super()._answer(messages))

    branch = RunnableParallel(
        a=RunnableLambda(lambda q: q + " for a") | Meeting(), b=RunnableLambda(lambda q: q + " for b") | Meeting()
    )
    join = RunnableLambda(lambda both: AIMessage(both["a"].content.upper()))
    assert match_of((branch | join | guard).invoke("q")) == "none"
    assert asked(guard)[0].question is None


def test_models_side_by_side_with_one_question_are_no_riddle() -> None:
    guard = keyword_guard()
    branch = RunnableParallel(a=EchoModel(slow_s=0.02), b=EchoModel(slow_s=0.02, label="reply to"))
    join = RunnableLambda(lambda both: AIMessage(both["a"].content + both["b"].content))
    assert match_of((branch | join | guard).invoke("q")) == "ancestor"
    assert asked(guard)[0].question == "q"


def test_how_it_was_matched() -> None:
    guard = keyword_guard()
    model = EchoModel()
    assert match_of((model | guard).invoke("q")) == "id"
    assert match_of((model | RunnableLambda(lambda m: AIMessage(m.content)) | guard).invoke("q")) == "text"
    assert match_of((model | RunnableLambda(lambda m: AIMessage(m.content + "!")) | guard).invoke("q")) == "ancestor"
    assert match_of((RunnableLambda(lambda q: AIMessage(q)) | guard).invoke("q")) == "none"
    assert match_of((model | guard).invoke("q", {"configurable": {"__protector_question": "other"}})) == "explicit"
    assert match_of(({"question": lambda q: "other", "answer": model} | guard).invoke("q")) == "explicit"
    assert [turn.question for turn in asked(guard)] == ["q", "q", "q", None, "other", "other"]


def test_the_dict_wins_over_the_config() -> None:
    guard = keyword_guard()
    config = {"configurable": {"__protector_question": [HumanMessage("from config")]}}
    guard.invoke({"question": "from dict", "answer": "a"}, config)
    guard.invoke({"answer": "a"}, config)
    assert [turn.question for turn in asked(guard)] == ["from dict", "from config"]


def test_a_providers_own_id_is_found() -> None:
    guard = keyword_guard()
    answers = iter([AIMessage("one", id="chatcmpl-1"), AIMessage("two", id="chatcmpl-2")])
    model = GenericFakeChatModel(messages=answers)

    def both(_: str) -> AIMessage:
        first = model.invoke("first question")
        model.invoke("second question")
        return first.model_copy(update={"content": "altered"})

    assert match_of((RunnableLambda(both) | guard).invoke("x")) == "id"
    assert asked(guard)[0].question == "first question"


def test_the_last_of_calls_in_a_row_asked_the_question() -> None:
    guard = keyword_guard()
    rephrase = EchoModel(label="please") | StrOutputParser()
    chain = rephrase | EchoModel() | RunnableLambda(lambda m: m.content.upper()) | guard
    chain.invoke("q")
    assert asked(guard)[0].question == "please q"


def test_a_call_that_failed_asked_nothing() -> None:
    guard = keyword_guard()

    def try_both(_: str) -> AIMessage:
        first = EchoModel().invoke("answered")
        with pytest.raises(RuntimeError):
            EchoModel(fail=True).invoke("never answered")
        return AIMessage(first.content.upper())

    (RunnableLambda(try_both) | guard).invoke("x")
    assert asked(guard)[0].question == "answered"


def test_a_cached_answer_has_its_question() -> None:
    guard = keyword_guard()
    chain = EchoModel(cache=InMemoryCache()) | guard
    for question in ("q1", "q2", "q1"):
        chain.invoke(question)
    assert [turn.question for turn in asked(guard)] == ["q1", "q2", "q1"]


def test_history_and_images() -> None:
    guard = keyword_guard()
    history = [
        ("system", "Be kind."),
        HumanMessage("Old question"),
        AIMessage("Old answer"),
        HumanMessage(
            [
                {"type": "text", "text": "What is this?"},
                {"type": "image", "base64": "aGk=", "mime_type": "image/png"},
                {"type": "image_url", "image_url": {"url": "https://a.example/i.png"}},
            ]
        ),
    ]
    (EchoModel() | guard).invoke(history)
    turn = asked(guard)[0]
    assert turn.question == "What is this?"
    assert turn.images == (
        ImageInput(content=b"hi", media_type="image/png"),
        ImageInput(url="https://a.example/i.png"),
    )


def test_in_a_graph() -> None:
    graph = pytest.importorskip("langgraph.graph")
    guard = keyword_guard()
    model = EchoModel(slow_s=0.01)
    builder = graph.StateGraph(graph.MessagesState)
    builder.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_node("guard", lambda state: {"messages": [guard.invoke(state["messages"][-1])]})
    builder.add_edge(graph.START, "model")
    builder.add_edge("model", "guard")
    out = builder.compile().batch([{"messages": [("human", q)]} for q in QUESTIONS[:12]], {"max_concurrency": 12})
    assert_all_asked(guard, QUESTIONS[:12])
    assert all([m.type for m in state["messages"]] == ["human", "ai"] for state in out)
    assert all(match_of(state["messages"][-1]) == "id" for state in out)


def test_capture_can_be_off_for_a_guard() -> None:
    guard = keyword_guard(capture=False)
    assert match_of((EchoModel() | guard).invoke("q")) == "none"
    assert asked(guard)[0].question is None


def test_outside_of_the_chain_there_is_no_question() -> None:
    guard = keyword_guard()
    assert match_of(guard.invoke(EchoModel().invoke("q"))) == "none"

    def raw_thread(question: str) -> AIMessage:
        out: list[AIMessage] = []
        empty = contextvars.Context()
        thread = threading.Thread(target=lambda: out.append(empty.run(EchoModel().invoke, question)))
        thread.start()
        thread.join()
        return out[0]

    assert match_of((RunnableLambda(raw_thread) | guard).invoke("q")) == "none"


def test_nothing_is_remembered_after_the_root_run() -> None:
    before = capture.CAPTURE.open_runs
    guard = keyword_guard()
    chain = EchoModel() | RunnableLambda(lambda m: m) | guard
    chain.invoke("q")
    chain.batch(["q1", "q2"])
    list(chain.stream("q"))
    with pytest.raises(RuntimeError):
        (EchoModel(fail=True) | guard).invoke("q")
    with pytest.raises(RuntimeError):
        list((EchoModel(fail=True) | guard).stream("q"))
    half = (EchoModel() | StrOutputParser()).stream("q")
    next(half)
    assert capture.CAPTURE.open_runs > before
    half.close()
    del half
    gc.collect()
    assert capture.CAPTURE.open_runs == before


async def test_a_cancelled_chain_is_forgotten() -> None:
    before = capture.CAPTURE.open_runs
    task = asyncio.create_task((EchoModel(slow_s=1.0) | keyword_guard()).ainvoke("q"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert capture.CAPTURE.open_runs == before


def test_open_roots_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_OPEN_ROOTS", 10)
    memory = capture.PromptCapture()
    roots = [uuid4() for _ in range(25)]
    for root in roots:
        memory.on_chain_start({}, {}, run_id=root)
        memory.on_chat_model_start({}, [[HumanMessage("q")]], run_id=uuid4(), parent_run_id=root)
    assert memory.open_runs == 20
    judged = uuid4()
    memory.on_chain_start({}, {}, run_id=judged, parent_run_id=roots[-1])
    question, match = memory.find(judged, "text")
    assert question is not None
    assert (question.text, match) == ("q", "ancestor")
    memory.on_chain_end({}, run_id=roots[0])  # long forgotten: no error


def test_a_chains_own_answer_is_the_same_with_and_without_capture() -> None:
    model = FakeListChatModel(responses=["Plant roses."])
    with_capture = (model | keyword_guard()).invoke("q")
    without = (model | keyword_guard(capture=False)).invoke("q")
    assert with_capture.content == without.content == "Plant roses."
