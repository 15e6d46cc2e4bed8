"""The check of a streamed answer: the state machine of `streaming`, answered with models and a policy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from mllm_protector_guard import calls
from mllm_protector_guard.calls import name_of
from mllm_protector_guard.errors import GuardError, HarmfulAnswerError
from mllm_protector_guard.policy import GuardPolicy
from mllm_protector_guard.ports import Detoxifier, HarmDetector
from mllm_protector_guard.stream_scoring import StreamScoring
from mllm_protector_guard.streaming import Done, Event, Judge, Rewrite, Ruling, StreamMachine, StreamPolicy
from mllm_protector_guard.timelimit import TimeLimit
from mllm_protector_guard.types import GuardResult, ImageInput, Outcome, Reason, Turn
from mllm_protector_guard.verdicts import Case, decide, detoxify, ms_since

__all__ = ["END", "StreamCheck"]

logger = logging.getLogger(__name__)

# Stands for the end of the pieces. A None among them is a mistake of the caller, and not the end.
END: Final = object()


class StreamCheck:
    """The check of one streamed answer: every decision of it, and its one record.

    Args:
        question: What was asked; None when unknown.
        images: The images of the question, in order.
        detector: Scores the answer.
        detoxifier: Rewrites it; needed for `on_harm="detoxify"`.
        policy: What to do with a score. Its time limit is that of all model calls of the stream together.
        stream_policy: How much of the answer is held.
        threshold: Gives the score from which an answer is harmful; asked once the detector is loaded.
        emit: Takes the record.
    """

    def __init__(
        self,
        *,
        question: str | None,
        images: Sequence[ImageInput],
        detector: HarmDetector,
        detoxifier: Detoxifier | None,
        policy: GuardPolicy,
        stream_policy: StreamPolicy,
        threshold: Callable[[], float],
        emit: Callable[[Turn, GuardResult], None],
    ) -> None:
        self.result: GuardResult | None = None
        self._turn = Turn(question=question, answer="", images=tuple(images))
        self._detector = detector
        self._detoxifier = detoxifier
        self._policy = policy
        self._threshold = threshold
        self._emit = emit
        self._limit = TimeLimit(policy.timeout_s)
        self._machine = StreamMachine(stream_policy)
        self._scoring = StreamScoring(detector, question, images, self._limit)
        self._case = Case(turn=self._turn, threshold=1.0)
        self._error: GuardError | None = None
        self._recorded = False

    def prepare(self) -> None:
        """Loads the detector.

        Raises:
            CheckpointError: It cannot be loaded.
        """
        calls.warm_up(self._detector)
        self._case.threshold = self._threshold()

    def take(self, piece: object) -> None:
        """Takes in the next piece of the answer, or its end."""
        if piece is END:
            self._machine.end()
        elif isinstance(piece, str):
            self._machine.add(piece)
        else:
            raise TypeError(f"the pieces of a streamed answer must be str, got {name_of(piece)}")

    def poll(self) -> Event:
        """What to do next."""
        return self._machine.poll() if self._error is None else Done()

    def respond(self, event: Event) -> None:
        """Judges, rewrites or withholds; calls models."""
        if isinstance(event, Judge):
            started = time.perf_counter()
            score = self._scoring.score(event.text)
            self._case.detector_ms += ms_since(started)
            self._case.note_score(score)
            ruling = self._ruling()
            if ruling is not Ruling.RELEASE:
                self._scoring.close()  # its memory may be needed to rewrite
            self._machine.judged(ruling)
            return
        self._case.turn = replace(self._turn, answer=self._machine.answer)
        if isinstance(event, Rewrite):
            self._rewrite()
        verdict = decide(self._case, self._policy)
        text = self._machine.replace(verdict.result.text)
        self.result = replace(verdict.result, text=text, released_chars=self._machine.released)
        self._error = verdict.error
        if isinstance(verdict.error, HarmfulAnswerError):
            self._error = HarmfulAnswerError(self.result)

    def finish(self) -> None:
        """Makes the result, if all of the answer left, and the record.

        Raises:
            HarmfulAnswerError: The answer is harmful and the policy says `on_harm="raise"`.
            InferenceError: A model failed and the policy says `on_error="raise"`.
        """
        if self.result is None:
            self._case.turn = replace(self._turn, answer=self._machine.answer)
            self.result = replace(decide(self._case, self._policy).result, released_chars=self._machine.released)
        self._record(self.result)
        if self._error is not None:
            raise self._error

    def break_off(self, error: BaseException) -> None:
        """Records what had left before `error` ended the stream, if anything had, or anything was decided."""
        if self._recorded:
            return
        released = self._machine.released_text
        case = self._case
        if self.result is None and case.harmful and self._policy.on_harm != "flag":
            case.turn = replace(self._turn, answer=self._machine.answer)
            self.result = case.result(Outcome.WITHHELD, Reason.HARMFUL, released)
        elif self.result is None and released:
            case.turn = replace(self._turn, answer=released)
            self.result = replace(decide(case, self._policy).result, text=released)
        if self.result is not None:
            self.result = replace(self.result, error=name_of(error), released_chars=self._machine.released)
            self._record(self.result)
        self._scoring.close()

    def _ruling(self) -> Ruling:
        error, policy = self._case.error, self._policy
        if error is not None:
            logger.warning("a part of a stream was not judged, %s; on_error=%r", name_of(error), policy.on_error)
            return Ruling.RELEASE if policy.on_error == "pass" else Ruling.STOP
        if not self._case.harmful:
            return Ruling.RELEASE
        if policy.on_harm == "flag":
            return Ruling.OPEN
        return Ruling.TAKE if policy.on_harm == "detoxify" else Ruling.STOP

    def _rewrite(self) -> None:
        assert self._detoxifier is not None  # held by Guard for on_harm="detoxify"
        started = time.perf_counter()
        detoxify(
            [self._case],
            detector=self._detector,
            detoxifier=self._detoxifier,
            policy=self._policy,
            limit=self._limit,
        )
        self._case.detoxifier_ms = ms_since(started)

    def _record(self, result: GuardResult) -> None:
        self._recorded = True
        self._scoring.close()
        self._emit(self._case.turn, result)
