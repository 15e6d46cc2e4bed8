"""No text of a user or a model gets into an exception, a log line or a repr."""

import logging
import threading
import traceback

import pytest

from mllm_protector_guard import Guard, GuardError, GuardPolicy, ImageInput, Origin, Turn
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

MARKER = "xyzzy-4711"
TURN = Turn(question=f"q {MARKER}", answer=f"a bomb {MARKER}", images=(ImageInput(url=f"/home/{MARKER}.png"),))


class Raising:
    def score(self, turns):
        raise RuntimeError("broken")

    rewrite = score


class SayingText:
    """Gives back texts where numbers are due, and a number where texts are due."""

    def score(self, turns):
        return [turn.answer for turn in turns]

    def rewrite(self, turns, *, attempt=0):
        return list(turns)


class TooMany:
    def score(self, turns):
        return [turn.answer for turn in turns] * 2

    def rewrite(self, turns, *, attempt=0):
        return [turn.answer for turn in turns] * 2


class Stuck:
    def score(self, turns):
        threading.Event().wait(0.2)
        return [0.9] * len(turns)

    def rewrite(self, turns, *, attempt=0):
        threading.Event().wait(0.2)
        return [MARKER] * len(turns)


class BrokenSink:
    def emit(self, record):
        raise ValueError(f"cannot write {record!r}")


HARM = KeywordDetector({"bomb"})
MODELS = {
    "harmful": (HARM, ScriptedDetoxifier([f"bomb {MARKER}"])),
    "detector raises": (Raising(), Raising()),
    "detoxifier raises": (HARM, Raising()),
    "scores are texts": (SayingText(), SayingText()),
    "rewrites are turns": (HARM, SayingText()),
    "too many scores": (TooMany(), TooMany()),
    "too many rewrites": (HARM, TooMany()),
    "detector is stuck": (Stuck(), Stuck()),
    "detoxifier is stuck": (HARM, Stuck()),
}


@pytest.mark.parametrize("trace_content", [False, True])
@pytest.mark.parametrize("on_harm", ["detoxify", "raise", "withhold"])
@pytest.mark.parametrize("models", MODELS.values(), ids=MODELS.keys())
def test_texts_stay_out_of_exceptions_logs_and_reprs(models, on_harm, trace_content, caplog):
    caplog.set_level(logging.DEBUG)
    detector, detoxifier = models
    guard = Guard(
        detector=detector,
        detoxifier=detoxifier,
        policy=GuardPolicy(on_harm=on_harm, on_error="raise", timeout_s=0.05),
        sinks=[BrokenSink()],
        trace_content=trace_content,
    )
    (verdict,) = guard.check_batch([TURN], origins=[Origin(tags={"wrong": None})], return_exceptions=True)
    seen = [repr(verdict), str(verdict), repr(guard), caplog.text]
    if isinstance(verdict, GuardError):
        seen.append("".join(traceback.format_exception(verdict)))
        seen.append(repr(vars(verdict)))
    assert MARKER not in "\n".join(seen)
    assert caplog.records  # the broken sink was at work


def test_the_refusal_is_all_that_a_raised_verdict_carries():
    guard = Guard(detector=HARM, policy=GuardPolicy(on_harm="raise"))
    (error,) = guard.check_batch([TURN], return_exceptions=True)
    assert error.result.text == guard.policy.refusal
