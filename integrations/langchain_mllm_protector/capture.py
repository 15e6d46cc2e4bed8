"""Finds the question to an answer when a chain passes only the answer on.

`model | guard` hands the guard the answer alone. So the first `ProtectorGuard` with `capture=True`
registers a callback handler for every LangChain run of the process. It remembers, for each model call,
the question messages of its prompt (the whole prompt where a model takes plain text), with as many turns
before them as any guard's `context_turns` asks for, and what it answered, under each run around the
call, and forgets them when those runs end. Nothing is logged or stored elsewhere, and no run is changed.

A guard then looks upwards from its own run:

1. `id`: a call with the id of the message that is judged;
2. `text`: under the nearest run that made calls, a call that answered with exactly this text;
3. `ancestor`: under the same run, the latest call;
4. `none`: no call, or calls that overlapped in time and asked different questions. A wrong question
   is worse than none.

While an answer still comes in, its text is not known yet. Then only 1. counts, and 3. if that call still answers: a
guard that finds no question so holds the answer, and looks again at its end.

Not found: the question of a model that ran outside the guard's root run, or in a thread that was
started without LangChain's context.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.tracers.context import register_configure_hook

from langchain_mllm_protector.messages import Question, answer_text, question_messages, question_of

__all__ = ["CAPTURE", "PromptCapture", "enable_capture", "find_question", "find_question_early"]

MAX_OPEN_ROOTS = 16_384
"""Root runs that are remembered at once; beyond it the oldest is forgotten."""

MAX_CALLS_PER_RUN = 16_384
"""Model calls that are remembered under one run; beyond it the oldest is forgotten."""


@dataclass(slots=True, eq=False)
class _Call:
    """One model call. `started` and `ended` are ticks of one counter, so that overlaps can be seen."""

    run_id: str
    question: tuple[BaseMessage, ...] | str
    started: int
    ended: int | None = None
    failed: bool = False
    ids: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()

    def wrote(self, message_id: str) -> bool:
        # LangChain's own ids hold the run id: run-<id>, run--<id>, lc_run--<id>, lc_run--<id>-<n>.
        return message_id in self.ids or self.run_id in message_id

    def asked_like(self, other: _Call) -> bool:
        return _contents(self.question) == _contents(other.question)


@dataclass(slots=True, eq=False)
class _Run:
    root: UUID
    parent: UUID | None
    call: _Call | None = None
    calls: deque[_Call] = field(default_factory=lambda: deque(maxlen=MAX_CALLS_PER_RUN))


class PromptCapture(BaseCallbackHandler):
    """Remembers the questions of the model calls under every open run; safe from several threads."""

    # Inline: to hop to a worker thread for each event of an asynchronous run would cost more than the work.
    run_inline = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ticks = itertools.count()
        self._runs: dict[UUID, _Run] = {}
        self._trees: OrderedDict[UUID, set[UUID]] = OrderedDict()
        self.context_turns = 0  # the most that a guard asks for

    def find(
        self, run_id: UUID, answer: str | BaseMessage | None, *, context_turns: int = 0
    ) -> tuple[Question | None, str]:
        """The question to `answer`, judged in the run `run_id`, and how it was matched.

        None stands for an answer that no longer has the text of its model.
        """
        scopes = self._scopes(run_id)
        if written := _written(scopes, answer):
            return _asked(_latest(written), "id", context_turns)
        calls = next((calls for calls in scopes if calls), [])
        text = None if answer is None else answer_text(answer)
        if same := [call for call in calls if text in call.texts]:
            return _asked(_latest(same), "text", context_turns)
        return _asked(_latest(calls), "ancestor", context_turns)

    def find_early(
        self, run_id: UUID, begun: str | BaseMessage, *, context_turns: int = 0
    ) -> tuple[Question | None, str]:
        """`find` for an answer that has only begun: no question as long as it may turn out to be another."""
        scopes = self._scopes(run_id)
        if written := _written(scopes, begun):
            return _asked(_latest(written), "id", context_turns)
        call = _latest(next((calls for calls in scopes if calls), []))
        return _asked(call if call is not None and call.ended is None else None, "ancestor", context_turns)

    @property
    def open_runs(self) -> int:
        """How many runs are remembered."""
        return len(self._runs)

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Opens a run."""
        self._open(run_id, parent_run_id)

    def on_tool_start(
        self, serialized: Any, input_str: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Opens a run."""
        self._open(run_id, parent_run_id)

    def on_retriever_start(
        self, serialized: Any, query: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Opens a run."""
        self._open(run_id, parent_run_id)

    def on_chat_model_start(
        self,
        serialized: Any,
        messages: Sequence[Sequence[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Opens a run with a call."""
        self._open(run_id, parent_run_id, question_messages(messages[0], self.context_turns) if messages else ())

    def on_llm_start(
        self, serialized: Any, prompts: Sequence[str], *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """Opens a run with a call."""
        self._open(run_id, parent_run_id, prompts[0] if prompts else "")

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Notes what the call answered and closes its run."""
        generations = [generation for batch in response.generations for generation in batch]
        messages = [g.message for g in generations if isinstance(g, ChatGeneration)]
        texts = [g.text for g in generations] + [answer_text(message) for message in messages]
        ids = [message.id for message in messages if message.id]
        self._end_call(run_id, ids=frozenset(ids), texts=frozenset(texts))
        self._close(run_id)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forgets the call and closes its run."""
        self._end_call(run_id, failed=True)
        self._close(run_id)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Closes a run."""
        self._close(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Closes a run."""
        self._close(run_id)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Closes a run."""
        self._close(run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Closes a run."""
        self._close(run_id)

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Closes a run."""
        self._close(run_id)

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Closes a run."""
        self._close(run_id)

    def _open(
        self, run_id: UUID, parent_id: UUID | None, question: tuple[BaseMessage, ...] | str | None = None
    ) -> None:
        with self._lock:
            parent = None if parent_id is None else self._runs.get(parent_id)
            root = run_id if parent is None else parent.root
            run = _Run(root=root, parent=None if parent is None else parent_id)
            self._runs[run_id] = run
            self._trees.setdefault(root, set()).add(run_id)
            if question is not None:
                run.call = _Call(run_id=str(run_id), question=question, started=next(self._ticks))
                for ancestor in self._ancestors(run_id):
                    ancestor.calls.append(run.call)
            if len(self._trees) > MAX_OPEN_ROOTS:
                self._drop(next(iter(self._trees)))

    def _end_call(self, run_id: UUID, **outcome: Any) -> None:
        with self._lock:
            run = self._runs.get(run_id)
            if run is None or run.call is None:
                return
            run.call.ended = next(self._ticks)
            for name, value in outcome.items():
                setattr(run.call, name, value)

    def _close(self, run_id: UUID) -> None:
        with self._lock:
            run = self._runs.get(run_id)
            if run is None:
                return
            if run.root == run_id:
                self._drop(run_id)
            else:
                del self._runs[run_id]
                self._trees[run.root].discard(run_id)

    def _drop(self, root: UUID) -> None:
        for run_id in self._trees.pop(root):
            del self._runs[run_id]

    def _ancestors(self, run_id: UUID) -> list[_Run]:
        """The runs around `run_id`, nearest first."""
        found: list[_Run] = []
        run = self._runs.get(run_id)
        while run is not None and run.parent is not None:
            run = self._runs.get(run.parent)
            if run is not None:
                found.append(run)
        return found

    def _scopes(self, run_id: UUID) -> list[list[_Call]]:
        """The calls under each run around `run_id`, nearest first, without those that failed."""
        with self._lock:
            return [[call for call in run.calls if not call.failed] for run in self._ancestors(run_id)]


CAPTURE: Final = PromptCapture()
find_question = CAPTURE.find
find_question_early = CAPTURE.find_early
# The default of a context variable is seen by every thread and every task.
_capture: ContextVar[BaseCallbackHandler | None] = ContextVar("mllm_protector_capture", default=CAPTURE)
_registration = threading.Lock()
_registered = False


def enable_capture(context_turns: int = 0) -> None:
    """Registers the capture with LangChain for the rest of the process; once, however often it is called.

    From then on it keeps at least `context_turns` turns before each question.
    """
    global _registered
    with _registration:
        CAPTURE.context_turns = max(CAPTURE.context_turns, context_turns)
        if not _registered:
            register_configure_hook(_capture, inheritable=True)
            _registered = True


def _written(scopes: Sequence[Sequence[_Call]], answer: str | BaseMessage | None) -> list[_Call]:
    """The calls that the id of the message names, of the nearest run that has such calls."""
    message_id = answer.id if isinstance(answer, BaseMessage) else None
    if message_id is None:
        return []
    return next((found for calls in scopes if (found := [c for c in calls if c.wrote(message_id)])), [])


def _asked(call: _Call | None, match: str, context_turns: int) -> tuple[Question | None, str]:
    question = None if call is None else question_of(call.question, context_turns=context_turns)
    return (None, "none") if question is None else (question, match)


def _latest(calls: Sequence[_Call]) -> _Call | None:
    """The call that started last, or None if another one ran beside it and asked something else."""
    if not calls:
        return None
    latest = max(calls, key=lambda call: call.started)
    beside = [call for call in calls if call.ended is None or call.ended > latest.started]
    return latest if all(call.asked_like(latest) for call in beside) else None


def _contents(question: tuple[BaseMessage, ...] | str) -> list[Any]:
    return [question] if isinstance(question, str) else [message.content for message in question]
