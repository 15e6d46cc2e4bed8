"""The verdicts on answers, those that are more than a text included.

The text of an answer may be rewritten; the arguments of its tool calls and the values of a structured answer may not,
for a call with other arguments is another call. So an answer is judged in parts, all in one detector batch, and the
worst verdict is that on the answer. Every verdict on a part is the engine's own; only what they amount to is decided
here. There is one record an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

from langchain_mllm_protector.cases import QUESTION_KEY, Case, MissingQuestion, Step, ToolCalls, build_case
from langchain_mllm_protector.messages import question_of, unpack
from mllm_protector_guard import (
    DetectorError,
    Guard,
    GuardError,
    GuardRecord,
    GuardResult,
    HarmfulAnswerError,
    Origin,
    Outcome,
    Reason,
    Turn,
)

__all__ = ["check_calls", "judge", "steps_of"]

logger = logging.getLogger(__name__)

Verdict = GuardResult | GuardError
Judged = tuple[Verdict, GuardRecord]


def judge(
    guard: Guard,
    answers: Sequence[object],
    question: object | None,
    *,
    origin: Origin | None = None,
    on_missing_question: MissingQuestion = "answer_only",
    tool_calls: ToolCalls = "judge",
    context_turns: int = 0,
) -> list[Step]:
    """What becomes of each of some answers to one question, same order, with one detector batch.

    Args:
        guard: Decides.
        answers: Messages, `str`s or structured answers.
        question: A `str`, a message, a prompt value or a list of messages; None when unknown.
        origin: Where the answers come from, for the records; how the question was found is filled in.
        on_missing_question: As in `ProtectorGuard`.
        tool_calls: As in `ProtectorGuard`.
        context_turns: As in `ProtectorGuard`.

    Raises:
        TypeError: An answer or the question is of no known kind.
        CheckpointError: A model cannot be loaded.
    """
    asked = None if question is None else question_of(question, context_turns=context_turns)
    match = "none" if asked is None else "explicit"
    origin = replace(origin or Origin(integration="langchain"), question_match=match)
    cases = [
        build_case(unpack({"answer": answer})[1], asked, origin=origin, tool_calls=tool_calls) for answer in answers
    ]
    return steps_of(guard, cases, on_missing_question=on_missing_question)


def steps_of(guard: Guard, cases: Sequence[Case | TypeError], *, on_missing_question: MissingQuestion) -> list[Step]:
    """What becomes of each case, same order, with one detector batch; an error in the place of a case stays there."""
    good = [case for case in cases if isinstance(case, Case)]
    verdicts = iter(_check_all(guard, good, on_missing_question=on_missing_question))
    return [
        Step.of(case, next(verdicts), trace_content=guard.trace_content)
        if isinstance(case, Case)
        else Step(output=case)
        for case in cases
    ]


def _check_all(guard: Guard, cases: Sequence[Case], *, on_missing_question: MissingQuestion) -> list[Verdict]:
    missing = [case for case in cases if case.turn.question is None]
    if missing and on_missing_question in ("withhold", "raise"):
        blind = _without_question(guard, on_missing_question)
        unjudged = iter(_check(blind, missing))
        judged = iter(_check(guard, [case for case in cases if case.turn.question is not None]))
        return [next(unjudged if case.turn.question is None else judged) for case in cases]
    if missing and on_missing_question == "warn":
        logger.warning("%d of %d answers are judged without their questions: not found", len(missing), len(cases))
    return _check(guard, cases)


def check_calls(guard: Guard, case: Case, text: GuardResult) -> Judged:
    """The verdict on a streamed answer whose text was decided on before, now that its tool calls are whole.

    A refusal follows the text that left on a paragraph of its own.
    """
    spent_s = (text.detector_ms + text.detoxifier_ms) / 1000
    (values,) = _judge_parts(guard, [case.pieces_alone()], [case.origin], spent_s=spent_s)
    verdict, record = _whole(guard, case, (text, case.record(text, trace_content=guard.trace_content)), values)
    result = verdict.result if isinstance(verdict, HarmfulAnswerError) else verdict
    if not isinstance(result, GuardResult):
        return verdict, record
    shown = result.text
    if result.outcome is Outcome.WITHHELD and text.outcome is not Outcome.WITHHELD:
        shown = f"{text.text}\n\n{result.text}"
    elif result.outcome in (Outcome.WITHHELD, Outcome.DETOXIFIED):
        shown = text.text
    result = replace(
        result,
        text=shown,
        rewrites=text.rewrites,
        released_chars=text.released_chars,
        detector_ms=text.detector_ms + max(record.detector_ms for _, record in values),
        detoxifier_ms=text.detoxifier_ms,
    )
    ended = HarmfulAnswerError(result) if isinstance(verdict, HarmfulAnswerError) else result
    return ended, case.record(result, trace_content=guard.trace_content)


def _check(guard: Guard, cases: Sequence[Case]) -> list[Verdict]:
    if not any(case.pieces for case in cases):
        return guard.check_batch(
            [case.turn for case in cases], origins=[case.origin for case in cases], return_exceptions=True
        )
    started = time.perf_counter()
    judged = _judge_parts(guard, [case.parts() for case in cases], [case.origin for case in cases])
    harmful = [place for place, (text, *values) in enumerate(judged) if _asks_for_rewrite(guard, text, values)]
    # Scored once more, as the engine rewrites only what it has scored.
    rewritten = _judge(
        guard,
        [cases[place].turn for place in harmful],
        [cases[place].origin for place in harmful],
        timeout_s=_time_each(guard, len(cases), turns=len(harmful), spent_s=time.perf_counter() - started),
    )
    for place, (verdict, record) in zip(harmful, rewritten, strict=True):
        if isinstance(verdict, GuardResult):
            verdict = replace(verdict, detector_ms=verdict.detector_ms + judged[place][0][1].detector_ms)
        judged[place][0] = (verdict, record)
    wholes = [_whole(guard, case, text, values) for case, (text, *values) in zip(cases, judged, strict=True)]
    for _, record in wholes:
        guard.emit(record)
    return [verdict for verdict, _ in wholes]


def _judge_parts(
    guard: Guard, answers: Sequence[Sequence[Turn]], origins: Sequence[Origin], *, spent_s: float = 0.0
) -> list[list[Judged]]:
    """The verdict on each part of each answer, none rewritten, with one detector batch in the time of whole answers."""
    parts = [(turn, origin) for turns, origin in zip(answers, origins, strict=True) for turn in turns]
    judged = iter(
        _judge(
            guard,
            [turn for turn, _ in parts],
            [origin for _, origin in parts],
            on_harm="withhold" if guard.policy.on_harm == "detoxify" else guard.policy.on_harm,
            timeout_s=_time_each(guard, len(answers), turns=len(parts), spent_s=spent_s),
        )
    )
    return [list(islice(judged, len(turns))) for turns in answers]


def _time_each(guard: Guard, checks: int, *, turns: int, spent_s: float) -> float | None:
    """The time limit of each turn in seconds, when all have what is left of that of so many checks."""
    if guard.policy.timeout_s is None:
        return None
    return max(guard.policy.timeout_s * checks - spent_s, 1e-3) / max(turns, 1)


def _judge(guard: Guard, turns: Sequence[Turn], origins: Sequence[Origin], **policy: Any) -> list[Judged]:
    """The verdict of a guard with this policy on each turn, and its record, which no sink of `guard` gets."""
    kept = _KeptRecords()
    verdicts = guard.changed(sinks=[kept], **policy).check_batch(turns, origins=origins, return_exceptions=True)
    return list(zip(verdicts, kept.records, strict=True))


def _asks_for_rewrite(guard: Guard, text: Judged, values: Sequence[Judged]) -> bool:
    verdict, _ = text
    return (
        guard.policy.on_harm == "detoxify"
        and isinstance(verdict, GuardResult)
        and verdict.reason is Reason.HARMFUL
        and all(_severity(value) < _severity(text) for value in values)
    )


def _whole(guard: Guard, case: Case, text: Judged, values: Sequence[Judged]) -> Judged:
    """The worst verdict on a part, as the verdict on the answer; where the text is no worse it is that on a value."""
    worst = max(values, key=lambda value: (_severity(value), _score(value)), default=text)
    decisive = text if _severity(text) > _severity(worst) else worst
    verdict, _ = decisive
    result = verdict.result if isinstance(verdict, HarmfulAnswerError) else verdict
    if not isinstance(result, GuardResult):
        return decisive
    if result.harm_score is not None:
        result = replace(result, harm_score=max(_score(part) for part in (text, *values)))
    if result.outcome in (Outcome.PASSED, Outcome.FLAGGED):
        result = replace(result, text=case.judged.answer)
    if decisive is not text and result.reason is Reason.HARMFUL:
        result = replace(result, reason=Reason.HARMFUL_ARGUMENTS)
    whole = HarmfulAnswerError(result) if isinstance(verdict, HarmfulAnswerError) else result
    return whole, case.record(result, trace_content=guard.trace_content)


def _severity(judged: Judged) -> int:
    verdict, _ = judged
    if isinstance(verdict, HarmfulAnswerError):
        return 5
    if isinstance(verdict, GuardError):
        return 4
    if verdict.outcome is Outcome.PASSED:
        return 0 if verdict.error is None else 1
    return 3 if verdict.outcome is Outcome.WITHHELD else 2


def _score(judged: Judged) -> float:
    return judged[1].harm_score or 0.0


class _KeptRecords:
    """A sink that keeps the records of one batch."""

    def __init__(self) -> None:
        self.records: list[GuardRecord] = []

    def emit(self, record: GuardRecord) -> None:
        self.records.append(record)


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
