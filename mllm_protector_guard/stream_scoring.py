"""One growing answer, scored by the detector's own stream or, where it has none, anew each time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from mllm_protector_guard import calls
from mllm_protector_guard.calls import name_of
from mllm_protector_guard.errors import DetectorError, InferenceError
from mllm_protector_guard.ports import HarmDetector, StreamingDetector, StreamScorer
from mllm_protector_guard.rescoring import RescoringStream
from mllm_protector_guard.timelimit import TimeLimit
from mllm_protector_guard.types import ImageInput

__all__ = ["StreamScoring"]

logger = logging.getLogger(__name__)


class StreamScoring:
    """Scores one growing answer within a time limit.

    After a failure the answer is scored by a new scorer, from its beginning.

    Args:
        detector: Scores the answer.
        question: What was asked; None when unknown.
        images: The images of the question, in order.
        limit: The time that all calls together may take.
    """

    def __init__(
        self, detector: HarmDetector, question: str | None, images: Sequence[ImageInput], limit: TimeLimit
    ) -> None:
        self._detector = detector
        self._question = question
        self._images = tuple(images)
        self._limit = limit
        self._answer = ""
        self._opened: _Opened | None = None

    def score(self, text: str) -> float | InferenceError:
        """P(harmful) of the answer so far, [0, 1], after `text` was added; or why there is none.

        Raises:
            CheckpointError, ConfigError, MissingDependencyError: The detector cannot work at all.
        """
        self._answer += text
        if self._opened is None:
            self._opened, text = _Opened(), self._answer
        opened = self._opened

        def feed() -> float:
            return opened.feed(self._open, text)

        score = calls.harm_score_of(feed, self._detector, self._limit)
        if isinstance(score, InferenceError):
            self.close()
        return score

    def close(self) -> None:
        """Frees what the scorer holds, after the call that it may still be in."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self) -> StreamScorer:
        if isinstance(self._detector, StreamingDetector):
            return self._detector.open_stream(self._question, self._images)
        return RescoringStream(self._detector, self._question, self._images)


class _Opened:
    """A scorer that is closed when nobody uses it, though a call that was given up may go on for a while."""

    def __init__(self) -> None:
        self._scorer: StreamScorer | None = None
        self._closed = False
        self._in_use = threading.Lock()

    def feed(self, open_scorer: Callable[[], StreamScorer], text: str) -> float:
        with self._in_use:
            if self._closed:
                raise DetectorError("the stream was closed before its last text could be scored")
            if self._scorer is None:
                self._scorer = open_scorer()
            return self._scorer.feed(text)

    def close(self) -> None:
        if self._in_use.acquire(blocking=False):
            self._in_use.release()
            self._close()
        else:
            threading.Thread(target=self._close, name="mllm-protector-close", daemon=True).start()

    def _close(self) -> None:
        with self._in_use:
            self._closed = True
            if self._scorer is None:
                return
            try:
                self._scorer.close()
            except Exception as error:
                logger.warning("%s could not be closed: %s", name_of(self._scorer), name_of(error))
