"""A guard on a detector that batches: the same verdicts, many checks at once, and callers that give up."""

import asyncio
import gc
import threading

import pytest

from mllm_protector_guard import (
    BatchingDetector,
    ConfigError,
    Guard,
    GuardError,
    GuardPolicy,
    StreamingDetector,
    Turn,
    load_guard,
)
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier
from unit.batching_fakes import HeldDetector, in_thread, queued, turn, until

TURNS = [Turn(question="q", answer=answer) for answer in ("Roses.", "A bomb.", "", "crash", "Tulips.", "bombs")]
WITHHOLD = GuardPolicy(on_harm="withhold")


class Crashing(KeywordDetector):
    def score(self, turns):
        if any("crash" in turn.answer for turn in turns):
            raise RuntimeError("crash")
        return super().score(turns)


def comparable(verdict):
    if isinstance(verdict, GuardError):
        return type(verdict)
    scores = [rewrite.harm_score for rewrite in verdict.rewrites]
    return (verdict.outcome, verdict.reason, verdict.text, verdict.harm_score, scores, verdict.error)


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mllm-protector-check")]


@pytest.fixture
def no_thread_stays():
    gc.collect()
    until(lambda: not own_threads())
    yield
    gc.collect()
    until(lambda: not own_threads())


@pytest.mark.parametrize("on_error", ["withhold", "raise", "pass"])
@pytest.mark.parametrize("on_harm", ["detoxify", "withhold", "flag", "raise"])
async def test_verdicts_are_those_without_batching(on_harm, on_error):
    settings = {
        "detoxifier": ScriptedDetoxifier(["A bomb.", "Lilies."]),
        "policy": GuardPolicy(on_harm=on_harm, on_error=on_error),
    }
    bare = Guard(detector=Crashing({"bomb"}), **settings)
    expected = [comparable(verdict) for verdict in bare.check_batch(TURNS, return_exceptions=True)]
    with BatchingDetector(Crashing({"bomb"})) as detector:
        guard = Guard(detector=detector, **settings)
        singles = await asyncio.gather(*(guard.acheck(turn) for turn in TURNS), return_exceptions=True)
        assert [comparable(verdict) for verdict in singles] == expected
        batch = guard.check_batch(TURNS, return_exceptions=True)
        assert [comparable(verdict) for verdict in batch] == expected


class TestManyAtOnce:
    async def test_64_async_checks_share_three_passes(self):
        with BatchingDetector(HeldDetector()) as detector:
            guard = Guard(detector=detector, policy=WITHHOLD)
            checks = [asyncio.create_task(guard.acheck(turn(number / 200))) for number in range(64)]
            while len(detector._waiting) < 63:
                await asyncio.sleep(0.001)
            detector.detector.free.set()
            assert [result.harm_score for result in await asyncio.gather(*checks)] == [n / 200 for n in range(64)]
            assert [len(batch) for batch in detector.detector.batches] == [1, 32, 31]

    async def test_more_checks_than_threads_wait_their_turn(self):
        with BatchingDetector(HeldDetector(), max_batch=1) as detector:
            detector.detector.free.set()
            guard = Guard(detector=detector, policy=WITHHOLD)
            results = await asyncio.gather(*(guard.acheck(turn(number / 100)) for number in range(20)))
            assert [result.harm_score for result in results] == [number / 100 for number in range(20)]

    async def test_guards_share_passes_through_one_detector(self):
        with BatchingDetector(HeldDetector()) as detector:
            guards = [Guard(detector=detector, policy=WITHHOLD) for _ in range(3)]
            queued(detector, [])
            checks = [asyncio.create_task(guard.acheck(turn(0.1))) for guard in guards]
            while len(detector._waiting) < 3:
                await asyncio.sleep(0.001)
            detector.detector.free.set()
            await asyncio.gather(*checks)
            assert [len(batch) for batch in detector.detector.batches] == [1, 3]

    async def test_streams_that_are_scored_anew_share_passes(self):
        async def pieces():
            yield "0.1 One sentence."

        with BatchingDetector(HeldDetector()) as detector:
            guard = Guard(detector=detector, policy=WITHHOLD)
            queued(detector, [])

            async def read():
                return "".join([text async for text in guard.astream(pieces(), mode="whole")])

            reading = [asyncio.create_task(read()) for _ in range(3)]
            while len(detector._waiting) < 3:
                await asyncio.sleep(0.001)
            detector.detector.free.set()
            assert await asyncio.gather(*reading) == ["0.1 One sentence."] * 3
            assert [len(batch) for batch in detector.detector.batches] == [1, 3]


class TestGivingUp:
    def test_a_check_that_runs_out_of_time_leaves_the_queue(self):
        detector = BatchingDetector(HeldDetector(), max_wait_ms=0.0)
        guard = Guard(detector=detector, policy=GuardPolicy(on_harm="withhold", timeout_s=0.05))
        patient = queued(detector, [[turn(0.1)]])
        late = guard.check(turn(0.2))
        assert (late.outcome, late.reason) == ("withheld", "timeout")
        detector.detector.free.set()
        assert patient[0].result(timeout=20) == [0.1]
        until(lambda: not own_threads())
        assert detector.detector.batches == [["0.5"], ["0.1"]]

    def test_a_leader_that_runs_out_of_time_still_serves_its_followers(self):
        class Slow(HeldDetector):
            def score(self, turns):
                if len(turns) == 2:
                    assert second.wait(timeout=20)
                return super().score(turns)

        second = threading.Event()
        detector = BatchingDetector(Slow(), max_wait_ms=0.0)
        guard = Guard(detector=detector, policy=GuardPolicy(on_harm="withhold", timeout_s=0.3))
        queued(detector, [])
        late = in_thread(guard.check, turn(0.2))
        until(lambda: len(detector._waiting) == 1)
        (follower,) = queued(detector, [[turn(0.3)]], while_busy=False)
        detector.detector.free.set()
        assert late.result(timeout=20).reason == "timeout"
        second.set()
        assert follower.result(timeout=20) == [0.3]
        assert detector.detector.batches == [["0.5"], ["0.2", "0.3"]]

    async def test_a_cancelled_check_leaves_the_queue(self):
        with BatchingDetector(HeldDetector(), max_wait_ms=0.0) as detector:
            guard = Guard(detector=detector, policy=WITHHOLD)
            patient = queued(detector, [[turn(0.1)]])
            check = asyncio.create_task(guard.acheck(turn(0.2)))
            while len(detector._waiting) < 2:
                await asyncio.sleep(0.001)
            check.cancel()
            with pytest.raises(asyncio.CancelledError):
                await check
            detector.detector.free.set()
            assert patient[0].result(timeout=20) == [0.1]
        assert detector.detector.batches == [["0.5"], ["0.1"]]

    async def test_a_check_cancelled_within_its_time_limit_leaves_the_queue(self):
        with BatchingDetector(HeldDetector(), max_wait_ms=0.0) as detector:
            guard = Guard(detector=detector, policy=GuardPolicy(on_harm="withhold", timeout_s=20))
            patient = queued(detector, [[turn(0.1)]])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(guard.acheck(turn(0.2)), timeout=0.1)
            detector.detector.free.set()
            assert patient[0].result(timeout=20) == [0.1]
        assert detector.detector.batches == [["0.5"], ["0.1"]]

    def test_places_of_those_that_gave_up_are_free(self):
        detector = BatchingDetector(HeldDetector(), max_wait_ms=0.0, max_waiting=1)
        guard = Guard(detector=detector, policy=GuardPolicy(on_harm="withhold", timeout_s=0.05))
        queued(detector, [])
        assert guard.check(turn(0.2)).reason == "timeout"
        patient = in_thread(detector.score, [turn(0.1)])
        until(lambda: [call.chars for call in detector._waiting if not call.patience.over] == [256])
        detector.detector.free.set()
        assert patient.result(timeout=20) == [0.1]

    def test_a_full_queue_withholds_and_the_record_says_why(self):
        records = []

        class Keep:
            def emit(self, record):
                records.append(record)

        detector = BatchingDetector(HeldDetector(), max_wait_ms=0.0, max_waiting=1)
        guard = Guard(detector=detector, policy=WITHHOLD, sinks=[Keep()])
        waiting = queued(detector, [[turn(0.1)]])
        assert guard.check(turn(0.2)).outcome == "withheld"
        assert (records[0].reason, records[0].error) == ("error", "DetectorBusyError")
        detector.detector.free.set()
        assert waiting[0].result(timeout=20) == [0.1]


@pytest.mark.usefixtures("no_thread_stays")
class TestEnd:
    async def test_close_lets_accepted_checks_end_and_ends_the_threads(self):
        detector = BatchingDetector(HeldDetector(), max_batch=1)
        guard = Guard(detector=detector, policy=WITHHOLD)
        checks = [asyncio.create_task(guard.acheck(turn(number / 10))) for number in range(5)]
        while not detector._waiting:  # two of them have threads, three wait for one
            await asyncio.sleep(0.001)
        closing = in_thread(detector.close)
        detector.detector.free.set()
        assert [result.harm_score for result in await asyncio.gather(*checks)] == [0.0, 0.1, 0.2, 0.3, 0.4]
        await asyncio.to_thread(closing.result, 20)
        assert own_threads() == []

    @pytest.mark.parametrize("on_error", ["withhold", "raise", "pass"])
    async def test_afterwards_no_policy_lets_an_answer_pass_unchecked(self, on_error):
        with BatchingDetector(KeywordDetector({"bomb"})) as detector:
            guard = Guard(detector=detector, policy=GuardPolicy(on_harm="withhold", on_error=on_error))
        with pytest.raises(ConfigError, match="closed"):
            guard.check(TURNS[0])
        with pytest.raises(ConfigError, match="closed"):
            await guard.acheck(TURNS[0])

    async def test_a_detector_that_is_let_go_takes_its_threads_with_it(self):
        guard = Guard(detector=BatchingDetector(KeywordDetector({"bomb"})), policy=WITHHOLD)
        assert (await guard.acheck(TURNS[1])).outcome == "withheld"
        assert own_threads()
        del guard


class TestWhatAGuardAsksFor:
    def test_the_threshold_is_the_detectors_own_and_may_change(self):
        inner = KeywordDetector({"bomb"}, threshold=0.995)
        guard = Guard(detector=BatchingDetector(inner), policy=WITHHOLD)
        assert guard.threshold == 0.995
        inner.threshold = 0.3
        assert guard.threshold == 0.3

    def test_without_a_threshold_it_is_a_half(self):
        assert Guard(detector=BatchingDetector(HeldDetector()), policy=WITHHOLD).threshold == 0.5

    def test_warming_up_loads_the_detector(self):
        class Loaded(KeywordDetector):
            loads = 0

            def warm_up(self):
                self.loads += 1

        inner = Loaded({"bomb"})
        guard = Guard(detector=BatchingDetector(inner), policy=WITHHOLD)
        guard.warm_up()
        guard.check(TURNS[0])
        assert inner.loads == 2

    def test_the_detectors_own_stream_is_used(self):
        class Stream:
            def feed(self, text):
                return 0.75

            def close(self):
                pass

        class Streaming(KeywordDetector):
            def open_stream(self, question, images=()):
                return Stream()

        detector = BatchingDetector(Streaming({"bomb"}))
        assert isinstance(detector, StreamingDetector)
        assert detector.open_stream("Why?").feed("Because.") == 0.75

    def test_a_stream_is_guarded(self):
        guard = Guard(detector=BatchingDetector(KeywordDetector({"bomb"})), policy=WITHHOLD)
        with guard.stream(["Plant roses. ", "Then rest."], question="What now?") as stream:
            assert "".join(stream) == "Plant roses. Then rest."
        with guard.stream(["Build a bomb."], question="What now?") as stream:
            assert "bomb" not in "".join(stream)

    def test_load_guard_batches_when_asked(self):
        inner = KeywordDetector({"bomb"})
        assert load_guard(detector=inner, policy=WITHHOLD).detector is inner
        guard = load_guard(detector=inner, policy=WITHHOLD, batching=True)
        assert isinstance(guard.detector, BatchingDetector)
        assert guard.detector.detector is inner
        assert load_guard(detector=guard.detector, policy=WITHHOLD, batching=True).detector is guard.detector
