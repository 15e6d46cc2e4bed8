"""The time limit over several calls."""

import threading
import time

import pytest

from mllm_protector_guard import CheckTimeoutError
from mllm_protector_guard.timelimit import TimeLimit


def test_without_a_limit_calls_run_in_the_thread_of_the_caller():
    assert TimeLimit(None).run(threading.get_ident) == threading.get_ident()


def test_calls_share_one_budget():
    limit = TimeLimit(0.2)
    limit.run(lambda: time.sleep(0.15))
    with pytest.raises(CheckTimeoutError):
        limit.run(lambda: time.sleep(0.15))


def test_time_between_calls_is_not_counted():
    limit = TimeLimit(0.2)
    for _ in range(3):
        time.sleep(0.1)
        assert limit.run(lambda: "value") == "value"


def test_with_nothing_left_no_call_is_started():
    limit, stop, started = TimeLimit(0.01), threading.Event(), []
    with pytest.raises(CheckTimeoutError):
        limit.run(lambda: stop.wait(timeout=10))
    with pytest.raises(CheckTimeoutError):
        limit.run(lambda: started.append("late"))
    stop.set()
    assert started == []


@pytest.mark.parametrize("seconds", [None, 5.0])
@pytest.mark.parametrize("error", [ValueError("x"), TimeoutError("the model's own"), KeyboardInterrupt()], ids=repr)
def test_errors_of_a_call_arrive_as_they_are(seconds, error):
    def fail():
        raise error

    with pytest.raises(type(error)) as raised:
        TimeLimit(seconds).run(fail)
    assert raised.value is error


def test_an_abandoned_call_ends_in_silence(caplog):
    stop = threading.Event()
    ended = threading.Event()

    def fail_late():
        stop.wait(timeout=10)
        ended.set()
        raise RuntimeError("too late to matter")

    with pytest.raises(CheckTimeoutError):
        TimeLimit(0.01).run(fail_late)
    stop.set()
    assert ended.wait(timeout=10)
    assert caplog.text == ""
