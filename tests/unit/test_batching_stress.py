"""Many threads at once, with errors, time limits and all lengths: everybody gets what is theirs, and nobody hangs."""

import asyncio
import random
import threading
import time

import pytest

from mllm_protector_guard import BatchingDetector, Guard, GuardPolicy
from unit.batching_fakes import in_thread, turn


class Busy:
    """Scores the number an answer begins with, fails on `crash`, and is never entered twice at once."""

    def __init__(self, seed):
        self.chances = random.Random(seed)
        self.sizes = []
        self.inside = threading.Lock()

    def score(self, turns):
        assert self.inside.acquire(blocking=False), "two batches at once"
        try:
            self.sizes.append(len(turns))
            time.sleep(self.chances.choice([0.0, 0.0005, 0.002]))
            if any("crash" in turn.answer for turn in turns):
                raise RuntimeError("crash")
            return [float(turn.answer.split()[0]) for turn in turns]
        finally:
            self.inside.release()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_wait_ms", [0.0, 1.0])
def test_threads_get_their_own_scores_and_their_own_errors(seed, max_wait_ms):
    detector = BatchingDetector(Busy(seed), max_batch=8, max_wait_ms=max_wait_ms)

    def caller(number):
        chances = random.Random(seed * 1000 + number)
        for _ in range(15):
            values = [chances.randrange(10_000) / 10_000 for _ in range(chances.choice([1, 1, 1, 2, 5, 20]))]
            crash = chances.random() < 0.1
            turns = [turn(value, chances.choice([0, 300, 900, 5000]), crash=crash) for value in values]
            if crash:
                with pytest.raises(RuntimeError, match="crash"):
                    detector.score(turns)
            else:
                assert detector.score(turns) == values
            time.sleep(chances.choice([0.0, 0.001]))

    callers = [in_thread(caller, number) for number in range(24)]
    for future in callers:
        future.result(timeout=60)
    assert max(detector.detector.sizes) <= 8
    assert any(size > 1 for size in detector.detector.sizes)
    assert not detector._busy
    assert not detector._waiting
    detector.close()


@pytest.mark.parametrize("seed", range(3))
async def test_checks_that_are_cancelled_or_late_harm_no_other(seed):
    chances = random.Random(seed)
    with BatchingDetector(Busy(seed), max_batch=8) as detector:
        patient = Guard(detector=detector, policy=GuardPolicy(on_harm="withhold"))
        hasty = Guard(detector=detector, policy=GuardPolicy(on_harm="withhold", timeout_s=0.003))

        async def check(number):
            await asyncio.sleep(chances.random() * 0.05)
            kind = chances.choice(["patient", "hasty", "cancelled", "crash"])
            task = asyncio.create_task(
                (hasty if kind == "hasty" else patient).acheck(turn(number / 1000, crash=kind == "crash"))
            )
            if kind == "cancelled":
                await asyncio.sleep(chances.random() * 0.004)
                task.cancel()
            return kind, number, (await asyncio.gather(task, return_exceptions=True))[0]

        for kind, number, result in await asyncio.gather(*(check(number) for number in range(200))):
            if kind == "cancelled" and isinstance(result, asyncio.CancelledError):
                continue
            if kind == "crash":
                assert result.reason == "error"
            elif kind != "hasty" or result.reason != "timeout":
                assert result.harm_score == number / 1000
    assert not detector._busy
