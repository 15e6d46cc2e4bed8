"""One answer on its way through the guard: from a chain's value to what is judged, and from the verdict back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from langchain_core.callbacks import BaseRunManager
from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig

from langchain_mllm_protector.capture import find_question
from langchain_mllm_protector.leaves import call_leaves, leaves, pieces
from langchain_mllm_protector.messages import (
    Message,
    Question,
    answer_text,
    question_of,
    unpack,
    with_text,
    without_calls,
)
from mllm_protector_guard import (
    DetectorError,
    GuardError,
    GuardRecord,
    GuardResult,
    HarmfulAnswerError,
    Origin,
    Outcome,
    Reason,
    Turn,
)

__all__ = [
    "QUESTION_KEY",
    "Case",
    "MissingQuestion",
    "Step",
    "ToolCalls",
    "build_case",
    "calls_go",
    "case_of",
    "explicit_question",
    "origin_of",
    "with_record",
]

QUESTION_KEY: Final = "__protector_question"
RECORD_KEY: Final = "protector"

MissingQuestion = Literal["answer_only", "warn", "withhold", "raise"]
ToolCalls = Literal["judge", "ignore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An answer as it came, and what the guard is asked about it.

    Attributes:
        answer: The answer.
        turn: The question and the text of the answer; no text in a structured answer.
        pieces: What else is judged of the answer, and never rewritten: arguments of tool calls, values.
        origin: Where it comes from, for the record.
    """

    answer: object
    turn: Turn
    pieces: tuple[str, ...] = ()
    origin: Origin

    @property
    def judged(self) -> Turn:
        """The turn with all that is judged of the answer, for the record."""
        texts = [text for text in (self.turn.answer, *self.pieces) if text]
        return replace(self.turn, answer="\n\n".join(texts)) if self.pieces else self.turn

    def parts(self) -> list[Turn]:
        """The turns that are judged: the text, which may be blank, and the pieces."""
        return [self.turn, *self.pieces_alone()]

    def pieces_alone(self) -> list[Turn]:
        """A turn for each piece."""
        return [replace(self.turn, answer=piece) for piece in self.pieces]

    def record(self, result: GuardResult, *, trace_content: bool = False) -> GuardRecord:
        """The record of `result`."""
        return GuardRecord.of(self.judged, result, origin=self.origin, trace_content=trace_content)

    def output(self, result: GuardResult, record: GuardRecord) -> object:
        """What may leave, in the type the answer came in; an error if nothing of that type may.

        Args:
            result: What was decided.
            record: That of `result`.
        """
        if isinstance(self.answer, str):
            return result.text
        changed = result.outcome in (Outcome.DETOXIFIED, Outcome.WITHHELD)
        if isinstance(self.answer, BaseMessage):
            message = with_text(self.answer, result.text) if changed else self.answer
            if self.pieces and calls_go(result):
                message = without_calls(message)
            return with_record(message, record)
        if not changed:
            return self.answer
        if result.harmful:
            return HarmfulAnswerError(result)
        return DetectorError(
            f"a structured answer could not be judged ({result.error}), and no refusal can stand in its place. "
            'Catch this error, or let it pass with on_error="pass".'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a run of the guard ends with: the value that leaves or the error it fails with, and the record."""

    output: Any
    record: GuardRecord | None = None

    @classmethod
    def of(cls, case: Case, verdict: GuardResult | GuardError, *, trace_content: bool) -> Step:
        """The step that `verdict` on `case` leads to."""
        result = verdict.result if isinstance(verdict, HarmfulAnswerError) else verdict
        if not isinstance(result, GuardResult):
            return cls(output=result)
        record = case.record(result, trace_content=trace_content)
        output = verdict if isinstance(verdict, GuardError) else case.output(result, record)
        return cls(output=output, record=record)


def calls_go(result: GuardResult) -> bool:
    """Whether the tool calls that were judged are withheld with the text: they are harmful, or may be."""
    return result.outcome is Outcome.WITHHELD and result.reason not in (Reason.HARMFUL, Reason.REWRITE_REJECTED)


def with_record(message: Message, record: GuardRecord) -> Message:
    """A copy of `message` with the record of its check, never with texts: they would carry a harmful answer along."""
    shown = record.model_copy(update={"question": None, "answer": None, "text": None})
    metadata = {**message.response_metadata, RECORD_KEY: shown.model_dump(mode="json")}
    return message.model_copy(update={"response_metadata": metadata})


def case_of(
    value: object,
    config: RunnableConfig,
    *,
    run_manager: BaseRunManager,
    capture: bool,
    tool_calls: ToolCalls = "judge",
    context_turns: int = 0,
) -> Case:
    """The case of `value`, the input of the run that `run_manager` manages.

    Raises:
        TypeError: `value` holds no answer that can be judged, or its question is of no known kind.
    """
    given, answer = unpack(value)
    question: Question | None = None
    match = "none"
    explicit = explicit_question(given, config, context_turns=context_turns)
    if explicit is not None:
        question, match = explicit
    elif capture:
        said = answer if isinstance(answer, (str, BaseMessage)) else None
        question, match = find_question(run_manager.run_id, said, context_turns=context_turns)
    return build_case(answer, question, origin=origin_of(match, run_manager), tool_calls=tool_calls)


def build_case(answer: object, question: Question | None, *, origin: Origin, tool_calls: ToolCalls = "judge") -> Case:
    """The case of a `str`, a message or a structured answer to `question`."""
    text, values = "", []
    if isinstance(answer, str):
        text = answer
    elif isinstance(answer, BaseMessage):
        text = answer_text(answer)
        values = call_leaves(answer) if tool_calls == "judge" else []
    else:
        values = leaves(answer)
    images = () if question is None else question.images
    turn = Turn(question=None if question is None else question.text, answer=text, images=images)
    return Case(answer=answer, turn=turn, pieces=pieces(values), origin=origin)


def explicit_question(
    given: object | None, config: RunnableConfig, *, context_turns: int = 0
) -> tuple[Question | None, str] | None:
    """The question that came with the answer or else with the call, and its match; None if none came.

    Raises:
        TypeError: The question is of no known kind.
    """
    if given is None:
        given = (config.get("configurable") or {}).get(QUESTION_KEY)
    if given is None:
        return None
    question = question_of(given, context_turns=context_turns)
    return question, "none" if question is None else "explicit"


def origin_of(match: str, run_manager: BaseRunManager) -> Origin:
    """Where a check in the run that `run_manager` manages comes from, and how its question was found."""
    return Origin(
        integration="langchain",
        question_match=match,
        run_id=str(run_manager.run_id),
        parent_run_id=None if run_manager.parent_run_id is None else str(run_manager.parent_run_id),
    )
