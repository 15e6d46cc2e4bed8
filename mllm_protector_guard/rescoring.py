"""Streams for detectors that cannot score a growing answer by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from mllm_protector_guard.errors import DetectorError
from mllm_protector_guard.ports import HarmDetector
from mllm_protector_guard.types import ImageInput, Turn

__all__ = ["RescoringStream"]


class RescoringStream:
    """Implements the `StreamScorer` port by `score` on the whole answer so far, at every feed.

    Args:
        detector: Scores the answers.
        question: What was asked; None when unknown.
        images: The images of the question, in order.
    """

    def __init__(self, detector: HarmDetector, question: str | None, images: Sequence[ImageInput] = ()) -> None:
        self._detector = detector
        self._question = question
        self._images = tuple(images)
        self._answer = ""
        self._closed = False

    def feed(self, text: str) -> float:
        """The detector's score of the whole answer so far.

        Raises:
            DetectorError: The stream is closed, or the detector gave another number of scores than one.
        """
        if self._closed:
            raise DetectorError("this stream is closed; open another for the next answer")
        self._answer += text
        turn = Turn(question=self._question, answer=self._answer, images=self._images)
        scores = list(self._detector.score((turn,)))
        if len(scores) != 1:
            raise DetectorError(f"{type(self._detector).__name__} gave {len(scores)} scores for 1 turn")
        return scores[0]

    def close(self) -> None:
        """Forgets the answer; `feed` raises from now on."""
        self._closed = True
        self._answer = ""
