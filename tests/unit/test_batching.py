"""Concurrent scores share passes: who goes with whom, who first, and what an error, a full queue or an end does."""

import signal
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.detector_contract import DetectorContract
from mllm_protector_guard import BatchingDetector, CheckpointError, ConfigError, DetectorBusyError, DetectorError
from mllm_protector_guard.fakes import KeywordDetector
from unit.batching_fakes import HeldDetector, in_thread, queued, turn, until

WAIT_S = 20


def batching(**settings):
    return BatchingDetector(HeldDetector(), **{"max_wait_ms": 0.0, **settings})


def free(detector):
    detector.detector.free.set()
    return detector


def results(futures):
    return [future.result(timeout=WAIT_S) for future in futures]


class TestContract(DetectorContract):
    tolerance = 0.0

    @pytest.fixture
    def detector(self):
        return BatchingDetector(KeywordDetector({"knife", "hurt"}), max_batch=2)


class TestAlone:
    def test_a_call_runs_at_once_and_in_its_own_thread(self):
        detector = free(batching(max_wait_ms=60_000))
        assert detector.score([turn(0.25)]) == [0.25]
        assert detector.detector.threads == [threading.get_ident()]

    def test_an_error_leaves_the_detector_free(self):
        detector = free(batching())
        with pytest.raises(RuntimeError):
            detector.score([turn(0.1, crash=True)])
        assert detector.score([turn(0.2)]) == [0.2]

    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2000)), max_size=12), st.integers(1, 5))
    def test_any_number_of_turns_is_scored_in_order(self, rows, max_batch):
        detector = free(batching(max_batch=max_batch))
        assert detector.score([turn(number, chars) for number, chars in rows]) == [number for number, _ in rows]
        assert all(len(batch) <= max_batch for batch in detector.detector.batches)


class TestTogether:
    def test_those_that_wait_share_one_pass_and_each_gets_its_own_scores(self):
        detector = batching()
        waiting = queued(detector, [[turn(0.1)], [turn(0.2), turn(0.3)], [turn(0.4)]])
        free(detector)
        assert results(waiting) == [[0.1], [0.2, 0.3], [0.4]]
        assert detector.detector.batches == [["0.5"], ["0.1", "0.2", "0.3", "0.4"]]

    def test_a_batch_has_at_most_so_many_turns_and_calls_stay_whole(self):
        detector = batching(max_batch=3)
        waiting = queued(detector, [[turn(0.1)], [turn(0.2)] * 3, [turn(0.3)], [turn(0.4)]])
        free(detector)
        results(waiting)
        assert detector.detector.batches == [["0.5"], ["0.1", "0.3", "0.4"], ["0.2"] * 3]

    def test_texts_of_unlike_length_go_apart(self):
        detector = batching(length_ratio=2.0)
        calls = [[turn(0.1, 1000)], [turn(0.2, 400)], [turn(0.3, 1900)], [turn(0.4, 100)], [turn(0.6, 500)]]
        waiting = queued(detector, calls)
        free(detector)
        assert results(waiting) == [[0.1], [0.2], [0.3], [0.4], [0.6]]
        assert detector.detector.batches == [["0.5"], ["0.1", "0.3"], ["0.2", "0.4", "0.6"]]

    def test_one_that_has_waited_waits_for_company_until_its_batch_is_full(self):
        detector = batching(max_wait_ms=60_000, max_batch=2)
        first = queued(detector, [[turn(0.1)]])
        free(detector)
        until(lambda: not detector._waiting)
        second = in_thread(detector.score, [turn(0.2)])
        assert results([*first, second]) == [[0.1], [0.2]]
        assert detector.detector.batches == [["0.5"], ["0.1", "0.2"]]

    def test_it_does_not_wait_longer_than_was_said(self):
        detector = batching(max_wait_ms=50)
        waiting = queued(detector, [[turn(0.1)]])
        started = time.monotonic()
        free(detector)
        assert results(waiting) == [[0.1]]
        assert 0.04 <= time.monotonic() - started < WAIT_S


class TestFairness:
    def test_the_oldest_leads_the_next_batch_whatever_its_length(self):
        detector = batching()
        waiting = queued(detector, [[turn(0.1, 100_000)], [turn(0.2)], [turn(0.3)]])
        free(detector)
        results(waiting)
        assert detector.detector.batches == [["0.5"], ["0.1"], ["0.2", "0.3"]]

    def test_an_odd_one_is_not_overtaken_for_ever(self):
        class Refilled(HeldDetector):
            def score(self, turns):
                scores = super().score(turns)
                if len(self.batches) < 20:  # each batch brings two more of the common kind
                    later.extend(in_thread(detector.score, [turn(0.2)]) for _ in range(2))
                    until(lambda: len(detector._waiting) >= 2)
                return scores

        later = []
        detector = BatchingDetector(Refilled(), max_wait_ms=0.0)
        waiting = queued(detector, [[turn(0.2)], [turn(0.1, 100_000)]])
        free(detector)
        assert results(waiting) == [[0.2], [0.1]]
        assert detector.detector.batches.index(["0.1"]) == 2
        results(later)

    def test_others_come_between_the_parts_of_a_large_call(self):
        detector = batching(max_batch=2)
        large = in_thread(detector.score, [turn(number / 10) for number in range(5)])
        until(detector.detector.working.is_set)
        small = queued(detector, [[turn(0.9)]], while_busy=False)
        free(detector)
        assert results([large, *small]) == [[0.0, 0.1, 0.2, 0.3, 0.4], [0.9]]
        assert detector.detector.batches == [["0.0", "0.1"], ["0.9"], ["0.2", "0.3"], ["0.4"]]


class TestErrors:
    def test_an_error_reaches_only_the_call_that_caused_it(self, caplog):
        detector = batching()
        waiting = queued(detector, [[turn(0.1)], [turn(0.2, crash=True), turn(0.3)], [turn(0.4)]])
        free(detector)
        assert results(waiting[::2]) == [[0.1], [0.4]]
        with pytest.raises(RuntimeError, match=r"0\.2 crash"):
            waiting[1].result(timeout=WAIT_S)
        assert detector.detector.batches[2:] == [["0.1"], ["0.2", "0.3"], ["0.4"]]
        assert "a batch of 3 calls failed with RuntimeError" in caplog.text
        assert "crash" not in caplog.text
        assert detector.score([turn(0.6)]) == [0.6]

    def test_each_call_that_failed_runs_in_its_own_thread(self):
        detector = batching()
        waiting = queued(detector, [[turn(0.1, crash=True)], [turn(0.2)]])
        free(detector)
        assert waiting[0].exception(timeout=WAIT_S) is not None
        assert results(waiting[1:]) == [[0.2]]
        assert len(set(detector.detector.threads[2:])) == 2

    def test_newcomers_do_not_get_before_a_batch_that_failed(self):
        class Refilled(HeldDetector):
            def score(self, turns):
                if len(turns) == 3:
                    later.append(in_thread(detector.score, [turn(0.9)]))
                    until(lambda: len(detector._waiting) == 1)
                return super().score(turns)

        later = []
        detector = BatchingDetector(Refilled(), max_wait_ms=0.0)
        waiting = queued(detector, [[turn(0.1)], [turn(0.2)], [turn(0.3, crash=True)]])
        free(detector)
        assert results(waiting[:2]) == [[0.1], [0.2]]
        assert results(later) == [[0.9]]
        assert detector.detector.batches[2:] == [["0.1"], ["0.2"], ["0.3"], ["0.9"]]

    def test_a_wrong_number_of_scores_for_a_batch_is_given_to_nobody(self):
        class Short(HeldDetector):
            def score(self, turns):
                return super().score(turns)[:1]

        detector = BatchingDetector(Short(), max_wait_ms=0.0)
        waiting = queued(detector, [[turn(0.1)], [turn(0.2)]])
        free(detector)
        assert results(waiting) == [[0.1], [0.2]]

    def test_a_wrong_number_of_scores_for_a_part_is_an_error(self):
        class Short(HeldDetector):
            def score(self, turns):
                return super().score(turns)[:1]

        detector = free(BatchingDetector(Short(), max_batch=2))
        with pytest.raises(DetectorError, match="gave 1 scores for 2 turns"):
            detector.score([turn(0.1)] * 3)

    def test_a_detector_that_cannot_work_says_so_to_everyone(self):
        class Broken(HeldDetector):
            def score(self, turns):
                super().score(turns)
                raise CheckpointError("no weights", source="somewhere")

        detector = BatchingDetector(Broken(), max_wait_ms=0.0)
        waiting = queued(detector, [[turn(0.1)], [turn(0.2)]])
        free(detector)
        assert [type(future.exception(timeout=WAIT_S)) for future in waiting] == [CheckpointError] * 2

    def test_an_interrupt_of_the_leader_is_its_own_and_its_followers_are_scored(self):
        class Interrupted(HeldDetector):
            def score(self, turns):
                scores = super().score(turns)
                if len(turns) > 1:
                    raise KeyboardInterrupt
                return scores

        detector = BatchingDetector(Interrupted(), max_wait_ms=0.0)
        waiting = queued(detector, [[turn(0.1)], [turn(0.2)], [turn(0.3)]])
        free(detector)
        assert isinstance(waiting[0].exception(timeout=WAIT_S), KeyboardInterrupt)
        assert results(waiting[1:]) == [[0.2], [0.3]]

    def test_an_interrupt_of_one_that_waits_takes_it_out_of_the_queue(self):
        detector = batching()
        first = in_thread(detector.score, [turn(0.1)])
        until(detector.detector.working.is_set)

        def interrupt():
            until(lambda: detector._waiting)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        interrupting = in_thread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            detector.score([turn(0.2)])
        interrupting.result(timeout=WAIT_S)
        free(detector)
        assert results([first]) == [[0.1]]
        assert detector.score([turn(0.3)]) == [0.3]
        assert detector.detector.batches == [["0.1"], ["0.3"]]


class TestBackpressure:
    def test_a_full_queue_refuses_at_once_and_takes_on_again_later(self):
        detector = batching(max_waiting=2)
        waiting = queued(detector, [[turn(0.1)], [turn(0.2)]])
        with pytest.raises(DetectorBusyError, match="2 calls wait for HeldDetector already"):
            detector.score([turn(0.3)])
        free(detector)
        assert results(waiting) == [[0.1], [0.2]]
        assert detector.score([turn(0.3)]) == [0.3]


class TestEnd:
    def test_afterwards_calls_are_refused(self):
        with free(batching()) as detector:
            assert detector.score([turn(0.1)]) == [0.1]
        detector.close()
        with pytest.raises(ConfigError, match="closed"):
            detector.score([turn(0.1)])

    def test_it_waits_for_the_calls_that_were_taken_on(self):
        detector = batching()
        waiting = queued(detector, [[turn(0.1)], [turn(0.2)]])
        closing = in_thread(detector.close)
        until(lambda: detector._closed)
        with pytest.raises(ConfigError, match="closed"):
            detector.score([turn(0.3)])
        assert not closing.done()
        free(detector)
        assert results([*waiting, closing]) == [[0.1], [0.2], None]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch": 0},
        {"max_waiting": 0},
        {"max_wait_ms": -1.0},
        {"max_wait_ms": float("nan")},
        {"length_ratio": 0.5},
        {"length_ratio": float("nan")},
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        batching(**settings)


@pytest.mark.parametrize("detector", [None, KeywordDetector, object()])
def test_what_is_no_detector_is_refused(detector):
    with pytest.raises(ConfigError, match=r"score\(\)"):
        BatchingDetector(detector)
