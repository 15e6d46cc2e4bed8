"""One answer on its way through the guard: from a chain's value to a turn, and from the verdict back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

from langchain_core.callbacks import BaseRunManager
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import RunnableConfig

from langchain_mllm_protector.capture import find_question
from langchain_mllm_protector.messages import Message, Question, answer_text, question_of, unpack, with_text
from mllm_protector_guard import (
    DetectorError,
    Guard,
    GuardError,
    GuardRecord,
    GuardResult,
    HarmfulAnswerError,
    Origin,
    Outcome,
    Turn,
)

__all__ = ["Case", "MissingQuestion", "Step", "case_of", "check", "explicit_question", "origin_of", "with_record"]

logger = logging.getLogger(__name__)

QUESTION_KEY: Final = "__protector_question"
RECORD_KEY: Final = "protector"

MissingQuestion = Literal["answer_only", "warn", "withhold", "raise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An answer as it came, and what the guard is asked about it."""

    answer: str | BaseMessage
    turn: Turn
    origin: Origin

    def record(self, result: GuardResult, *, trace_content: bool = False) -> GuardRecord:
        """The record of `result`."""
        return GuardRecord.of(self.turn, result, origin=self.origin, trace_content=trace_content)

    def output(self, result: GuardResult) -> AIMessage | str:
        """What may leave, in the type the answer came in."""
        if isinstance(self.answer, str):
            return result.text
        changed = result.outcome in (Outcome.DETOXIFIED, Outcome.WITHHELD)
        message = with_text(self.answer, result.text) if changed else self.answer
        return cast("AIMessage", with_record(message, self.record(result)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a run of the guard ends with: the value that leaves or the error it fails with, and the record."""

    output: AIMessage | str | Exception
    record: GuardRecord | None = None

    @classmethod
    def of(cls, case: Case, verdict: GuardResult | GuardError, *, trace_content: bool) -> Step:
        """The step that `verdict` on `case` leads to."""
        result = verdict.result if isinstance(verdict, HarmfulAnswerError) else verdict
        if not isinstance(result, GuardResult):
            return cls(output=result)
        output = verdict if isinstance(verdict, GuardError) else case.output(result)
        return cls(output=output, record=case.record(result, trace_content=trace_content))


def with_record(message: Message, record: GuardRecord) -> Message:
    """A copy of `message` with the record of its check, never with texts: they would carry a harmful answer along."""
    shown = record.model_copy(update={"question": None, "answer": None, "text": None})
    metadata = {**message.response_metadata, RECORD_KEY: shown.model_dump(mode="json")}
    return message.model_copy(update={"response_metadata": metadata})


def case_of(value: object, config: RunnableConfig, *, run_manager: BaseRunManager, capture: bool) -> Case:
    """The case of `value`, the input of the run that `run_manager` manages.

    Raises:
        TypeError: `value` holds no answer that can be judged, or its question is of no known kind.
    """
    given, answer = unpack(value)
    question: Question | None = None
    match = "none"
    explicit = explicit_question(given, config)
    if explicit is not None:
        question, match = explicit
    elif capture:
        question, match = find_question(run_manager.run_id, answer)
    return Case(
        answer=answer,
        turn=Turn(
            question=None if question is None else question.text,
            answer=answer_text(answer),
            images=() if question is None else question.images,
        ),
        origin=origin_of(match, run_manager),
    )


def explicit_question(given: object | None, config: RunnableConfig) -> tuple[Question | None, str] | None:
    """The question that came with the answer or else with the call, and its match; None if none came.

    Raises:
        TypeError: The question is of no known kind.
    """
    if given is None:
        given = (config.get("configurable") or {}).get(QUESTION_KEY)
    if given is None:
        return None
    question = question_of(given)
    return question, "none" if question is None else "explicit"


def origin_of(match: str, run_manager: BaseRunManager) -> Origin:
    """Where a check in the run that `run_manager` manages comes from, and how its question was found."""
    return Origin(
        integration="langchain",
        question_match=match,
        run_id=str(run_manager.run_id),
        parent_run_id=None if run_manager.parent_run_id is None else str(run_manager.parent_run_id),
    )


def check(
    guard: Guard, cases: Sequence[Case], *, on_missing_question: MissingQuestion
) -> list[GuardResult | GuardError]:
    """The verdict on each case, same order, with one detector batch."""
    missing = [case for case in cases if case.turn.question is None]
    if missing and on_missing_question in ("withhold", "raise"):
        blind = _without_question(guard, on_missing_question)
        unjudged = iter(_check(blind, missing))
        judged = iter(_check(guard, [case for case in cases if case.turn.question is not None]))
        return [next(unjudged if case.turn.question is None else judged) for case in cases]
    if missing and on_missing_question == "warn":
        logger.warning("%d of %d answers are judged without their questions: not found", len(missing), len(cases))
    return _check(guard, cases)


def _check(guard: Guard, cases: Sequence[Case]) -> list[GuardResult | GuardError]:
    return guard.check_batch(
        [case.turn for case in cases], origins=[case.origin for case in cases], return_exceptions=True
    )


def _without_question(guard: Guard, on_error: Literal["withhold", "raise"]) -> Guard:
    """A guard like `guard` that cannot judge: the engine decides and records, as for any other failure."""
    policy = guard.policy.model_copy(
        update={"threshold": guard.threshold, "on_harm": "withhold", "on_error": on_error, "timeout_s": None}
    )
    return Guard(detector=_NoQuestion(), policy=policy, sinks=guard.sinks, trace_content=guard.trace_content)


class _NoQuestion:
    """A detector that refuses to score."""

    def score(self, turns: Sequence[Turn]) -> list[float]:
        raise DetectorError(
            "the question to this answer was not found and on_missing_question forbids to judge it without. "
            'Give {"question": ..., "answer": ...}, or config={"configurable": {"' + QUESTION_KEY + '": ...}}, '
            "or keep the guard in the chain of its model."
        )
