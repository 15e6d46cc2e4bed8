"""What the tests of batching share: a detector that waits to be let go, and callers in threads."""

import threading
import time
from concurrent.futures import Future

from mllm_protector_guard import Turn


class HeldDetector:
    """Scores the number an answer begins with, and notes each batch; works only while it is let go."""

    def __init__(self):
        self.batches = []
        self.threads = []
        self.free = threading.Event()
        self.working = threading.Event()

    def score(self, turns):
        self.batches.append([turn.answer.split()[0] for turn in turns])
        self.threads.append(threading.get_ident())
        self.working.set()
        assert self.free.wait(timeout=20)
        for turn in turns:
            if "crash" in turn.answer:
                raise RuntimeError(turn.answer)
        return [float(turn.answer.split()[0]) for turn in turns]


def turn(number, chars=0, *, crash=False):
    """A turn that scores `number`, with an answer of about `chars` characters."""
    return Turn(question="Why?", answer=f"{number} {'crash ' if crash else ''}".ljust(chars, "x"))


def in_thread(call, *args):
    """A future of `call(*args)`, run at once in a daemon thread."""
    future = Future()

    def run():
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def until(condition):
    """Returns once `condition()` holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.001)


def queued(batching, calls, *, while_busy=True):
    """Futures of `score` on each list of turns, waiting in this order behind a call that holds the detector."""
    held = [in_thread(batching.score, [turn(0.5)])] if while_busy else []
    until(batching.detector.working.is_set)
    for turns in calls:
        waiting = len(batching._waiting)
        held.append(in_thread(batching.score, turns))
        until(lambda waiting=waiting: len(batching._waiting) == waiting + 1)
    return held[1:] if while_busy else held
