"""The decisions of the guard when its models fail: fail closed, and no neighbour suffers."""

import contextvars
import threading

import pytest

from mllm_protector_guard import (
    CheckpointError,
    CheckTimeoutError,
    ConfigError,
    DetectorError,
    DetoxifierError,
    Guard,
    GuardPolicy,
    InferenceError,
    MissingDependencyError,
    Origin,
    Outcome,
    Reason,
    Turn,
)
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

HARMFUL = Turn(question="How?", answer="Build a bomb.")
HARMLESS = Turn(question="How?", answer="Plant roses.")
REFUSAL = "REFUSAL"


class Failing:
    """A detector and detoxifier that fails on answers with a given word, alone or in a batch."""

    def __init__(self, word, error=None, rewrites=("Roses.",)):
        self.word, self.error, self.rewrites = word, error or RuntimeError("out of memory"), rewrites
        self.batches = []

    def score(self, turns):
        self._fail(turns)
        return KeywordDetector({"bomb"}).score(turns)

    def rewrite(self, turns, *, attempt=0):
        self._fail(turns)
        return ScriptedDetoxifier(self.rewrites).rewrite(turns, attempt=attempt)

    def _fail(self, turns):
        self.batches.append(len(turns))
        if any(self.word in turn.answer for turn in turns):
            raise self.error


class Saying:
    """A detector whose scores, or a detoxifier whose rewrites, are whatever it was given."""

    def __init__(self, *values):
        self.values = values

    def score(self, turns):
        return self.values[0]

    def rewrite(self, turns, *, attempt=0):
        return self.values[min(attempt, len(self.values) - 1)]


def build(detector, detoxifier=None, **policy):
    return Guard(
        detector=detector,
        detoxifier=detoxifier or ScriptedDetoxifier(["Roses."]),
        policy=GuardPolicy(refusal=REFUSAL, **policy),
    )


class TestDetectorFails:
    @pytest.mark.parametrize("on_harm", ["detoxify", "withhold", "flag", "raise"])
    def test_withhold_is_the_default(self, on_harm):
        result = build(Failing("roses"), on_harm=on_harm).check(HARMLESS)
        assert (result.outcome, result.reason, result.text) == ("withheld", "error", REFUSAL)
        assert (result.error, result.harm_score, result.harmful) == ("DetectorError", None, None)

    @pytest.mark.parametrize("on_harm", ["detoxify", "withhold", "flag", "raise"])
    def test_pass(self, on_harm):
        result = build(Failing("roses"), on_harm=on_harm, on_error="pass").check(HARMLESS)
        assert (result.outcome, result.reason, result.error) == ("passed", "error", "DetectorError")
        assert result.text is HARMLESS.answer

    @pytest.mark.parametrize("on_harm", ["detoxify", "withhold", "flag", "raise"])
    def test_raise(self, on_harm):
        detector = Failing("roses", ValueError("detail"))
        with pytest.raises(DetectorError, match="Failing failed with ValueError") as raised:
            build(detector, on_harm=on_harm, on_error="raise").check(HARMLESS)
        assert raised.value.__cause__ is detector.error

    @pytest.mark.parametrize(
        "scores",
        [
            [float("nan")],
            [float("inf")],
            [float("-inf")],
            [1.0000001],
            [-0.0000001],
            [None],
            ["0.1"],
            [[0.1]],
            [],
            [0.1, 0.1],
            None,
            0.1,
            "1",
        ],
        ids=repr,
    )
    def test_an_unusable_score_is_an_error(self, scores):
        result = build(Saying(scores)).check(HARMLESS)
        assert (result.outcome, result.reason, result.error) == ("withheld", "error", "DetectorError")

    @pytest.mark.parametrize(("score", "used"), [(0, 0.0), (1, 1.0), (0.25, 0.25), (True, 1.0)])
    def test_any_real_number_in_range_is_a_score(self, score, used):
        assert build(Saying([score]), on_harm="flag").check(HARMLESS).harm_score == used

    def test_a_numpy_score_is_a_score(self):
        numpy = pytest.importorskip("numpy")
        result = build(Saying(numpy.array([0.25], dtype=numpy.float32))).check(HARMLESS)
        assert (result.harm_score, type(result.harm_score)) == (0.25, float)

    def test_neighbours_in_a_batch_do_not_suffer(self):
        detector = Failing("crash")
        turns = [HARMLESS, Turn(answer="crash"), HARMFUL, Turn(answer="")]
        results = build(detector).check_batch(turns)
        assert [result.outcome for result in results] == ["passed", "withheld", "detoxified", "passed"]
        assert [result.error for result in results] == [None, "DetectorError", None, None]
        assert detector.batches == [3, 1, 1, 1, 1]

    def test_one_bad_score_is_the_matter_of_one_turn(self):
        turns = [HARMLESS, HARMLESS, HARMLESS]
        results = build(Saying([0.1, float("nan"), 0.2])).check_batch(turns)
        assert [result.outcome for result in results] == ["passed", "withheld", "passed"]

    def test_return_exceptions(self):
        turns = [HARMLESS, Turn(answer="crash"), HARMLESS]
        results = build(Failing("crash"), on_error="raise").check_batch(turns, return_exceptions=True)
        assert [isinstance(result, DetectorError) for result in results] == [False, True, False]

    def test_its_own_inference_errors_arrive_as_they_are(self):
        error = InferenceError("cuda is gone")
        with pytest.raises(InferenceError) as raised:
            build(Failing("roses", error), on_error="raise").check(HARMLESS)
        assert raised.value is error

    def test_its_own_timeout_is_a_detector_error(self):
        result = build(Failing("roses", TimeoutError("remote")), timeout_s=5).check(HARMLESS)
        assert (result.reason, result.error) == (Reason.ERROR, "DetectorError")

    def test_keyboard_interrupt_is_not_swallowed(self):
        with pytest.raises(KeyboardInterrupt):
            build(Failing("roses", KeyboardInterrupt()), on_error="pass").check(HARMLESS)


class TestSetupFails:
    """A model that cannot work at all must be heard, whatever the policy says about single answers."""

    ERRORS = (
        CheckpointError("no such model", source="x"),
        ConfigError("no such device"),
        MissingDependencyError("bitsandbytes", "train"),
    )

    @pytest.mark.parametrize("on_error", ["withhold", "raise", "pass"])
    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_while_scoring(self, error, on_error):
        guard = build(Failing("", error), on_error=on_error)
        with pytest.raises(type(error)) as raised:
            guard.check_batch([HARMLESS, HARMFUL])
        assert raised.value is error

    @pytest.mark.parametrize("on_error", ["withhold", "raise", "pass"])
    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_while_rewriting(self, error, on_error):
        guard = build(KeywordDetector({"bomb"}), Failing("", error), on_error=on_error)
        assert guard.check(HARMLESS).outcome is Outcome.PASSED
        with pytest.raises(type(error)):
            guard.check(HARMFUL)

    @pytest.mark.parametrize("on_error", ["withhold", "raise", "pass"])
    def test_while_loading(self, on_error):
        class Missing(KeywordDetector):
            def warm_up(self):
                raise CheckpointError("not there", source="x")

        with pytest.raises(CheckpointError):
            build(Missing({"bomb"}), on_error=on_error).check(HARMLESS)


class TestDetoxifierFails:
    """A harmful answer never passes because something else broke."""

    @pytest.mark.parametrize("on_error", ["withhold", "pass"])
    def test_the_answer_is_withheld(self, on_error):
        detoxifier = Failing("bomb")
        result = build(KeywordDetector({"bomb"}), detoxifier, on_error=on_error).check(HARMFUL)
        assert (result.outcome, result.reason, result.text) == ("withheld", "error", REFUSAL)
        assert (result.error, result.harm_score) == ("DetoxifierError", 0.99)
        assert [rewrite.error for rewrite in result.rewrites] == ["DetoxifierError"] * 2
        assert len(detoxifier.batches) == 2

    def test_raise(self):
        with pytest.raises(DetoxifierError, match="Failing failed with RuntimeError"):
            build(KeywordDetector({"bomb"}), Failing("bomb"), on_error="raise").check(HARMFUL)

    @pytest.mark.parametrize("on_error", ["withhold", "pass"])
    @pytest.mark.parametrize("rewrites", [None, [], ["a", "b"], [None], [b"bytes"], [["text"]], "R", "", 7], ids=repr)
    def test_unusable_rewrites_are_errors(self, rewrites, on_error):
        result = build(KeywordDetector({"bomb"}), Saying(rewrites), on_error=on_error).check(HARMFUL)
        assert (result.outcome, result.error, result.text) == ("withheld", "DetoxifierError", REFUSAL)

    def test_a_second_attempt_may_still_succeed(self):
        result = build(KeywordDetector({"bomb"}), Saying(None, ["Roses."])).check(HARMFUL)
        assert (result.outcome, result.text, result.error) == ("detoxified", "Roses.", None)
        assert [rewrite.error for rewrite in result.rewrites] == ["DetoxifierError", None]

    @pytest.mark.parametrize("on_error", ["withhold", "pass"])
    def test_a_rewrite_that_cannot_be_scored_never_leaves(self, on_error):
        result = build(Failing("Rewritten"), ScriptedDetoxifier(["Rewritten."]), on_error=on_error).check(HARMFUL)
        assert (result.outcome, result.reason, result.error) == ("withheld", "error", "DetectorError")
        assert (result.text, result.rewrite_score) == (REFUSAL, None)

    @pytest.mark.parametrize("on_error", ["withhold", "pass"])
    def test_a_rewrite_with_an_impossible_score_never_leaves(self, on_error):
        class NanForRewrites(KeywordDetector):
            def score(self, turns):
                return [0.9 if "bomb" in turn.answer else float("nan") for turn in turns]

        result = build(NanForRewrites({"-"}), on_error=on_error).check(HARMFUL)
        assert (result.outcome, result.text) == ("withheld", REFUSAL)

    def test_neighbours_in_a_batch_do_not_suffer(self):
        turns = [HARMFUL, Turn(answer="crash bomb"), HARMLESS, HARMFUL]
        results = build(KeywordDetector({"bomb"}), Failing("crash")).check_batch(turns)
        assert [result.outcome for result in results] == ["detoxified", "withheld", "passed", "detoxified"]
        assert [result.attempts for result in results] == [1, 2, 0, 1]

    def test_an_error_decides_only_if_it_came_last(self):
        result = build(KeywordDetector({"bomb"}), Saying(None, ["A bomb."])).check(HARMFUL)
        assert (result.outcome, result.reason, result.error) == ("withheld", "rewrite_rejected", None)


class TestTimeLimit:
    @pytest.fixture
    def release(self):
        """Lets every waiting model call end; the test itself never sleeps longer than its limit."""
        event = threading.Event()
        yield event
        event.set()

    def slow(self, release, on="score"):
        class Slow(Failing):
            def _fail(self, turns):
                self.batches.append(len(turns))
                if self.word in turns[0].answer:
                    release.wait(timeout=10)

        return Slow(on)

    @pytest.mark.parametrize("on_harm", ["detoxify", "withhold", "flag", "raise"])
    def test_a_slow_detector_withholds(self, release, on_harm):
        detector = self.slow(release, on="roses")
        result = build(detector, on_harm=on_harm, timeout_s=0.05).check(HARMLESS)
        assert (result.outcome, result.reason, result.error) == ("withheld", "timeout", "CheckTimeoutError")
        assert result.text == REFUSAL

    def test_a_slow_detector_passes_only_if_the_policy_says_so(self, release):
        result = build(self.slow(release, on="roses"), timeout_s=0.05, on_error="pass").check(HARMLESS)
        assert (result.outcome, result.reason) == ("passed", "timeout")

    def test_a_slow_detector_raises_a_timeout_error(self, release):
        guard = build(self.slow(release, on="roses"), timeout_s=0.05, on_error="raise")
        with pytest.raises(TimeoutError, match="timeout_s") as raised:
            guard.check(HARMLESS)
        assert isinstance(raised.value, CheckTimeoutError)

    @pytest.mark.parametrize("on_error", ["withhold", "pass"])
    def test_a_slow_detoxifier_withholds_and_is_not_asked_again(self, release, on_error):
        detoxifier = self.slow(release, on="bomb")
        guard = build(KeywordDetector({"bomb"}), detoxifier, timeout_s=0.05, on_error=on_error, max_attempts=5)
        result = guard.check(HARMFUL)
        assert (result.outcome, result.reason, result.text) == ("withheld", "timeout", REFUSAL)
        assert (detoxifier.batches, result.attempts) == ([1], 1)

    def test_a_batch_that_ran_out_is_not_scored_one_by_one(self, release):
        detector = self.slow(release, on="roses")
        results = build(detector, timeout_s=0.02).check_batch([HARMLESS] * 3)
        assert [result.reason for result in results] == ["timeout"] * 3
        assert detector.batches == [3]

    def test_a_fast_check_is_not_touched(self):
        result = build(KeywordDetector({"bomb"}), timeout_s=30).check(HARMFUL)
        assert (result.outcome, result.error) == ("detoxified", None)

    def test_loading_does_not_count(self, release):
        class SlowToLoad(KeywordDetector):
            def warm_up(self):
                release.wait(timeout=0.3)

        assert build(SlowToLoad({"bomb"}), timeout_s=0.25).check(HARMLESS).outcome is Outcome.PASSED

    def test_a_batch_has_time_for_each_of_its_turns(self, release):
        class Steady(KeywordDetector):
            def score(self, turns):
                release.wait(timeout=0.06 * len(turns))
                return super().score(turns)

        results = build(Steady({"bomb"}), timeout_s=0.1).check_batch([HARMLESS] * 5)
        assert {result.outcome for result in results} == {Outcome.PASSED}

    def test_the_caller_of_a_slow_model_sees_its_context(self):
        tenant = contextvars.ContextVar("tenant")
        seen = []

        class Contextual(KeywordDetector):
            def score(self, turns):
                seen.append(tenant.get())
                return super().score(turns)

        tenant.set("blue")
        build(Contextual({"bomb"}), timeout_s=5).check(HARMLESS)
        assert seen == ["blue"]


class TestSinkFails:
    class Broken:
        def emit(self, record):
            raise OSError("disk full")

    def test_the_answer_leaves_and_the_other_sinks_get_their_record(self):
        kept = []

        class Keep:
            def emit(self, record):
                kept.append(record)

        guard = Guard(
            detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="flag"), sinks=[self.Broken(), Keep()]
        )
        assert guard.check(HARMLESS).text is HARMLESS.answer
        assert len(kept) == 1

    def test_it_is_logged(self, caplog):
        guard = Guard(detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="flag"), sinks=[self.Broken()])
        result = guard.check(HARMLESS)
        assert f"Broken lost record {result.id}: OSError" in caplog.text

    def test_a_record_that_cannot_be_made_does_not_stop_the_answer(self, caplog):
        guard = Guard(detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="flag"), sinks=[self.Broken()])
        origin = Origin(tags={"number": 3})
        assert guard.check(HARMLESS, origin=origin).text is HARMLESS.answer
        assert "ValidationError" in caplog.text


def test_errors_are_logged_with_the_policy(caplog):
    build(Failing("roses"), on_error="pass").check(HARMLESS)
    assert [record.getMessage() for record in caplog.records] == ["check ended with DetectorError; on_error='pass'"]
