"""The scores of a growing answer: the detector's own stream, else scoring anew; failures, limits and closing."""

import threading

import pytest

from mllm_protector_guard import (
    CheckpointError,
    CheckTimeoutError,
    DetectorError,
    ImageInput,
    StreamingDetector,
    StreamScorer,
    Turn,
)
from mllm_protector_guard.fakes import KeywordDetector
from mllm_protector_guard.rescoring import RescoringStream
from mllm_protector_guard.stream_scoring import StreamScoring
from mllm_protector_guard.timelimit import TimeLimit

NO_LIMIT = TimeLimit(None)
IMAGE = ImageInput(content=b"x")
PATIENCE_S = 10.0


class Streaming(KeywordDetector):
    """A detector with streams of its own; each of `fails` is raised by one feed, in order."""

    def __init__(self, keywords=("bomb",), fails=(), error_on_close=None):
        super().__init__(keywords)
        self.streams, self.opened_with = [], []
        self.fails, self.error_on_close = list(fails), error_on_close

    def score(self, turns):
        raise AssertionError("the stream should have been used")

    def open_stream(self, question, images=()):
        self.opened_with.append((question, images))
        self.streams.append(Fed(self))
        return self.streams[-1]


class Fed:
    def __init__(self, detector):
        self.detector, self.fed, self.closed = detector, [], threading.Event()

    def feed(self, text):
        self.fed.append(text)
        if self.detector.fails and (error := self.detector.fails.pop(0)) is not None:
            raise error
        return KeywordDetector.score(self.detector, [Turn(answer="".join(self.fed))])[0]

    def close(self):
        self.closed.set()
        if self.detector.error_on_close is not None:
            raise self.detector.error_on_close


class TestRescoring:
    def test_scores_the_whole_answer_each_time(self):
        detector = KeywordDetector({"bomb"})
        stream = RescoringStream(detector, "q", [IMAGE])
        assert [stream.feed(text) for text in ("a bo", "", "mb")] == [0.01, 0.01, 0.99]
        assert detector.calls == [
            (Turn(question="q", answer=answer, images=(IMAGE,)),) for answer in ("a bo", "a bo", "a bomb")
        ]

    def test_fits_the_port(self):
        assert isinstance(RescoringStream(KeywordDetector({"x"}), None), StreamScorer)
        assert isinstance(Streaming(), StreamingDetector)
        assert not isinstance(KeywordDetector({"x"}), StreamingDetector)

    def test_a_closed_stream_raises(self):
        stream = RescoringStream(KeywordDetector({"bomb"}), None)
        stream.feed("a")
        stream.close()
        stream.close()
        with pytest.raises(DetectorError, match="closed"):
            stream.feed("b")

    @pytest.mark.parametrize("scores", [[], [0.1, 0.2]])
    def test_another_number_of_scores_is_an_error(self, scores):
        class Many:
            def score(self, turns):
                return scores

        with pytest.raises(DetectorError, match=f"Many gave {len(scores)} scores"):
            RescoringStream(Many(), None).feed("a")


def test_the_detectors_own_stream_is_fed_what_is_new():
    detector = Streaming()
    scoring = StreamScoring(detector, "q", [IMAGE], NO_LIMIT)
    assert detector.streams == []
    assert [scoring.score(text) for text in ("a bo", "mb", "!")] == [0.01, 0.99, 0.99]
    assert detector.opened_with == [("q", (IMAGE,))]
    assert detector.streams[0].fed == ["a bo", "mb", "!"]
    scoring.close()
    scoring.close()
    assert detector.streams[0].closed.is_set()


def test_a_detector_without_streams_scores_anew():
    detector = KeywordDetector({"bomb"})
    scoring = StreamScoring(detector, None, (), NO_LIMIT)
    assert [scoring.score("a bo"), scoring.score("mb")] == [0.01, 0.99]
    assert [turn.answer for (turn,) in detector.calls] == ["a bo", "a bomb"]


def test_after_a_failure_a_new_stream_gets_all():
    detector = Streaming(fails=[None, RuntimeError("out of memory")])
    scoring = StreamScoring(detector, "q", (), NO_LIMIT)
    scores = [scoring.score(text) for text in ("a ", "bo", "mb")]
    assert scores[0] == 0.01
    assert isinstance(scores[1], DetectorError)
    assert str(scores[1]) == "Streaming failed with RuntimeError"
    assert isinstance(scores[1].__cause__, RuntimeError)
    assert scores[2] == 0.99
    assert [stream.fed for stream in detector.streams] == [["a ", "bo"], ["a bomb"]]
    assert detector.streams[0].closed.is_set()


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1, None, "0.1"], ids=repr)
def test_an_unusable_score_is_an_error(value, monkeypatch):
    monkeypatch.setattr(Fed, "feed", lambda self, text: value)
    assert isinstance(StreamScoring(Streaming(), None, (), NO_LIMIT).score("a"), DetectorError)


def test_a_detector_that_cannot_work_at_all_is_raised():
    detector = Streaming(fails=[CheckpointError("no weights", source="x")])
    with pytest.raises(CheckpointError):
        StreamScoring(detector, None, (), NO_LIMIT).score("a")


def test_an_error_of_closing_is_logged_and_goes_no_further(caplog):
    scoring = StreamScoring(Streaming(error_on_close=OSError("secret")), None, (), NO_LIMIT)
    scoring.score("a")
    scoring.close()
    assert [record.getMessage() for record in caplog.records] == ["Fed could not be closed: OSError"]


def test_a_scorer_that_overran_is_closed_when_its_call_ends():
    go_on = threading.Event()

    class Slow(Fed):
        def feed(self, text):
            go_on.wait(PATIENCE_S)
            assert not self.closed.is_set()
            return 0.1

    class Detector(Streaming):
        def open_stream(self, question, images=()):
            self.streams.append(Slow(self))
            return self.streams[-1]

    detector = Detector()
    scoring = StreamScoring(detector, None, (), TimeLimit(0.05))
    assert isinstance(scoring.score("a"), CheckTimeoutError)
    assert isinstance(scoring.score("b"), CheckTimeoutError)
    (stream,) = detector.streams
    assert not stream.closed.is_set()
    go_on.set()
    assert stream.closed.wait(PATIENCE_S)
