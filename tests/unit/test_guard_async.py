"""The async twins: the same verdicts, and an event loop that stays free."""

import asyncio
import threading

import pytest

from mllm_protector_guard import Guard, GuardError, GuardPolicy, HarmfulAnswerError, Origin, Turn
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

TURNS = [Turn(question="q", answer=answer) for answer in ("Roses.", "A bomb.", "", "crash", "Tulips.", "bombs")]


class Crashing(KeywordDetector):
    def score(self, turns):
        if any("crash" in turn.answer for turn in turns):
            raise RuntimeError("crash")
        return super().score(turns)


def build(**policy):
    return Guard(
        detector=Crashing({"bomb"}),
        detoxifier=ScriptedDetoxifier(["A bomb.", "Lilies."]),
        policy=GuardPolicy(**policy),
    )


def comparable(verdict):
    if isinstance(verdict, GuardError):
        return type(verdict)
    scores = [rewrite.harm_score for rewrite in verdict.rewrites]
    return (verdict.outcome, verdict.reason, verdict.text, verdict.harm_score, scores, verdict.error)


@pytest.mark.parametrize("on_error", ["withhold", "raise", "pass"])
@pytest.mark.parametrize("on_harm", ["detoxify", "withhold", "flag", "raise"])
async def test_all_four_ways_to_check_agree(on_harm, on_error):
    guard = build(on_harm=on_harm, on_error=on_error)

    def single(turn):
        try:
            return guard.check(turn)
        except GuardError as error:
            return error

    singles = [single(turn) for turn in TURNS]
    asingles = await asyncio.gather(*(guard.acheck(turn) for turn in TURNS), return_exceptions=True)
    batch = guard.check_batch(TURNS, return_exceptions=True)
    abatch = await guard.acheck_batch(TURNS, return_exceptions=True)
    expected = [comparable(verdict) for verdict in singles]
    assert [comparable(verdict) for verdict in asingles] == expected
    assert [comparable(verdict) for verdict in batch] == expected
    assert [comparable(verdict) for verdict in abatch] == expected


async def test_errors_are_raised_from_the_async_twins():
    guard = build(on_harm="raise")
    with pytest.raises(HarmfulAnswerError):
        await guard.acheck(TURNS[1])
    with pytest.raises(HarmfulAnswerError):
        await guard.acheck_batch(TURNS)


async def test_origins_arrive():
    records = []

    class Keep:
        def emit(self, record):
            records.append(record.run_id)

    guard = Guard(detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="flag"), sinks=[Keep()])
    await guard.acheck(TURNS[0], origin=Origin(run_id="one"))
    await guard.acheck_batch(TURNS[:2], origins=[Origin(run_id="two"), Origin(run_id="three")])
    assert records == ["one", "two", "three"]


async def test_the_event_loop_stays_free_while_a_model_works():
    working, let_go = threading.Event(), threading.Event()

    class Waiting(KeywordDetector):
        def score(self, turns):
            working.set()
            assert let_go.wait(timeout=10)
            return super().score(turns)

    guard = Guard(detector=Waiting({"bomb"}), policy=GuardPolicy(on_harm="flag"))
    check = asyncio.create_task(guard.acheck(TURNS[0]))
    while not working.is_set():  # only a free loop comes round to look
        await asyncio.sleep(0.001)
    assert not check.done()
    let_go.set()
    assert (await check).outcome == "passed"


async def test_many_checks_at_once():
    guard = build()
    turns = [Turn(answer=f"bomb {n}" if n % 2 else f"rose {n}") for n in range(50)]
    results = await asyncio.gather(*(guard.acheck(turn) for turn in turns))
    assert [result.text for result in results] == [f"rose {n}" if n % 2 == 0 else "Lilies." for n in range(50)]
