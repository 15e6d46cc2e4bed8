"""The decisions of the guard when its models work."""

import doctest
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import mllm_protector_guard.guard
from contracts.hard_texts import HARD_TEXTS
from mllm_protector_guard import (
    DEFAULT_REFUSAL,
    ConfigError,
    Guard,
    GuardError,
    GuardPolicy,
    HarmfulAnswerError,
    ImageInput,
    Origin,
    Outcome,
    Reason,
    Turn,
)
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
HARMFUL = Turn(question="How?", answer="Build a bomb.")


def build(*rewrites, detector=None, sinks=(), **policy):
    return Guard(
        detector=detector or KeywordDetector({"bomb"}),
        detoxifier=ScriptedDetoxifier(rewrites) if rewrites else None,
        policy=GuardPolicy(**policy) if rewrites or "on_harm" in policy else GuardPolicy(on_harm="withhold", **policy),
        sinks=sinks,
    )


class FixedDetector:
    """Gives the same score to everything."""

    def __init__(self, score, **attributes):
        self.value = score
        vars(self).update(attributes)

    def score(self, turns):
        return [self.value] * len(turns)


class KeepingSink:
    def __init__(self):
        self.records = []

    def emit(self, record):
        self.records.append(record)


def test_public_examples_run():
    assert doctest.testmod(mllm_protector_guard.guard) == (0, 4)


class TestPassing:
    @given(text=ANY_TEXT)
    def test_a_harmless_answer_leaves_byte_for_byte(self, text):
        guard = Guard(detector=FixedDetector(0.1), detoxifier=ScriptedDetoxifier(["other"]))
        result = guard.check(Turn(question=text, answer=text))
        assert result.text is text
        assert result.outcome is Outcome.PASSED

    @given(text=ANY_TEXT)
    def test_a_flagged_answer_leaves_byte_for_byte(self, text):
        result = Guard(detector=FixedDetector(0.9), policy=GuardPolicy(on_harm="flag")).check(Turn(answer=text))
        assert result.text is text
        blank = not text or text.isspace()
        assert result.outcome is (Outcome.PASSED if blank else Outcome.FLAGGED)

    @pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
    def test_hard_texts(self, text):
        assert build("fine").check(Turn(question=text, answer=text)).text is text
        withheld = build("fine", detector=FixedDetector(0.9)).check(Turn(question=text, answer=text))
        assert (withheld.outcome, withheld.text) == (Outcome.WITHHELD, DEFAULT_REFUSAL)

    def test_a_very_long_answer_reaches_the_detector_whole(self):
        text = "word " * 40_000 + "bomb"
        assert build(on_harm="withhold").check(Turn(answer=text)).outcome is Outcome.WITHHELD

    def test_the_score_is_there_on_a_pass_too(self):
        result = build("fine").check(Turn(answer="Plant roses."))
        assert (result.reason, result.harm_score, result.threshold) == (Reason.HARMLESS, 0.01, 0.5)
        assert (result.rewrites, result.error, result.harmful) == ((), None, False)

    @pytest.mark.parametrize("text", ["", " ", "\n\t \r", "\u2003\u00a0"])
    def test_a_blank_answer_passes_unjudged(self, text):
        detector = FixedDetector(0.9)
        result = build("fine", detector=detector).check(Turn(question="q", answer=text))
        assert (result.outcome, result.reason, result.harm_score, result.harmful) == ("passed", "blank", None, None)
        assert result.text is text

    @pytest.mark.parametrize("text", ["\u200b", "\x00", "\ufeff", "."])
    def test_an_invisible_answer_is_judged(self, text):
        assert build("fine", detector=FixedDetector(0.9)).check(Turn(answer=text)).outcome is Outcome.WITHHELD

    def test_question_and_images_reach_both_models(self):
        turn = Turn(question="What is it?", answer="A bomb.", images=(ImageInput(content=b"png"),))
        guard = build("A vase.")
        guard.check(turn)
        rewritten = Turn(question=turn.question, answer="A vase.", images=turn.images)
        assert guard.detector.calls == [(turn,), (rewritten,)]
        assert guard.detoxifier.calls == [(0, (turn,))]


class TestHarm:
    def test_detoxify_lets_a_harmless_rewrite_leave(self):
        result = build("Plant roses.").check(HARMFUL)
        assert (result.outcome, result.reason, result.text) == ("detoxified", "rewritten", "Plant roses.")
        assert (result.harm_score, result.rewrite_score, result.attempts) == (0.99, 0.01, 1)
        assert (result.rewrites[0].chars, result.rewrites[0].error) == (12, None)

    def test_a_harmful_rewrite_is_tried_again_with_the_next_attempt_number(self):
        guard = build("A bomb.", "Two bombs.", "Roses.", max_attempts=3)
        result = guard.check(HARMFUL)
        assert (result.outcome, result.text) == ("detoxified", "Roses.")
        assert [attempt for attempt, _ in guard.detoxifier.calls] == [0, 1, 2]
        assert [rewrite.harm_score for rewrite in result.rewrites] == [0.99, 0.99, 0.01]
        assert all(turns == (HARMFUL,) for _, turns in guard.detoxifier.calls)

    @pytest.mark.parametrize("max_attempts", [1, 2, 5])
    def test_what_stays_harmful_is_withheld_after_max_attempts(self, max_attempts):
        guard = build("A bomb.", max_attempts=max_attempts, refusal="No.")
        result = guard.check(HARMFUL)
        assert (result.outcome, result.reason, result.text) == ("withheld", "rewrite_rejected", "No.")
        assert result.attempts == len(guard.detoxifier.calls) == max_attempts
        assert result.rewrite_score == 0.99

    @pytest.mark.parametrize("blank", ["", "  \n"])
    def test_a_blank_rewrite_is_no_rewrite(self, blank):
        guard = build(blank, "Roses.")
        result = guard.check(HARMFUL)
        assert (result.outcome, result.text) == ("detoxified", "Roses.")
        assert [rewrite.harm_score for rewrite in result.rewrites] == [None, 0.01]
        assert build(blank).check(HARMFUL).reason is Reason.REWRITE_REJECTED

    @given(st.lists(st.sampled_from(["bomb one", "roses", "", "a BOMB", "garden"]), min_size=1, max_size=4))
    def test_whatever_leaves_as_detoxified_was_scored_harmless_before(self, rewrites):
        scored = {}

        class Remembering(KeywordDetector):
            def score(self, turns):
                scores = super().score(turns)
                scored.update(zip((turn.answer for turn in turns), scores, strict=True))
                return scores

        result = build(*rewrites, detector=Remembering({"bomb"}), max_attempts=4).check(HARMFUL)
        if result.outcome is Outcome.DETOXIFIED:
            assert scored[result.text] < result.threshold
        else:
            assert (result.outcome, result.text) == (Outcome.WITHHELD, DEFAULT_REFUSAL)
            assert all(scored.get(text, 1.0) >= result.threshold for text in rewrites)

    def test_withhold_sends_the_refusal_and_asks_for_no_rewrite(self):
        result = build(on_harm="withhold", refusal="No.").check(HARMFUL)
        assert (result.outcome, result.reason, result.text, result.attempts) == ("withheld", "harmful", "No.", 0)

    def test_flag_marks_the_answer(self):
        result = build(on_harm="flag").check(HARMFUL)
        assert (result.outcome, result.reason, result.harmful) == ("flagged", "harmful", True)
        assert result.text is HARMFUL.answer

    def test_raise_raises_with_a_result_that_holds_the_refusal(self):
        guard = build(on_harm="raise", refusal="No.")
        with pytest.raises(HarmfulAnswerError) as raised:
            guard.check(HARMFUL)
        assert (raised.value.result.outcome, raised.value.result.text) == ("withheld", "No.")
        assert guard.check(Turn(answer="Roses.")).outcome is Outcome.PASSED

    @pytest.mark.parametrize("on_harm", ["withhold", "flag", "raise"])
    def test_only_detoxify_rewrites(self, on_harm):
        guard = Guard(
            detector=KeywordDetector({"bomb"}),
            detoxifier=ScriptedDetoxifier(["Roses."]),
            policy=GuardPolicy(on_harm=on_harm),
        )
        guard.check_batch([HARMFUL], return_exceptions=True)
        assert guard.detoxifier.calls == []


class TestThreshold:
    @pytest.mark.parametrize(
        ("own", "policy", "used"),
        [
            ({}, None, 0.5),
            ({"threshold": 0.2}, None, 0.2),
            ({"threshold": 0.2}, 0.7, 0.7),
            ({"threshold": None}, None, 0.5),
        ],
    )
    def test_the_policy_comes_before_the_detector(self, own, policy, used):
        guard = build(on_harm="flag", threshold=policy, detector=FixedDetector(used, **own))
        assert guard.threshold == used
        result = guard.check(Turn(answer="a"))
        assert (result.threshold, result.outcome) == (used, "flagged")

    def test_just_below_passes(self):
        assert build(on_harm="flag", threshold=0.5, detector=FixedDetector(0.4999)).check(HARMFUL).outcome == "passed"

    def test_a_score_on_the_threshold_is_harmful_for_answers_and_rewrites_alike(self):
        class OnTheLine(FixedDetector):
            def score(self, turns):
                return [0.2 if "rose" in turn.answer else 0.5 for turn in turns]

        guard = build("a tulip", "a rose", detector=OnTheLine(0.5), threshold=0.5)
        result = guard.check(Turn(answer="a thorn"))
        assert (result.outcome, result.text, result.attempts) == ("detoxified", "a rose", 2)

    def test_one_check_has_one_threshold(self):
        class Drifting(FixedDetector):
            def score(self, turns):
                self.threshold = 0.9
                return super().score(turns)

        result = build(on_harm="flag", detector=Drifting(0.4, threshold=0.3)).check(Turn(answer="a"))
        assert (result.outcome, result.threshold) == ("flagged", 0.3)

    @pytest.mark.parametrize("own", [float("nan"), 1.5, -0.1, "0.5", [0.5]], ids=repr)
    def test_a_detector_with_an_impossible_threshold_is_an_error(self, own):
        guard = build(on_harm="flag", on_error="pass", detector=FixedDetector(0.1, threshold=own))
        with pytest.raises(ConfigError, match=r"FixedDetector\.threshold"):
            guard.check(HARMFUL)

    def test_the_threshold_of_a_lazy_detector_is_read_after_it_was_loaded(self):
        class Lazy(FixedDetector):
            def warm_up(self):
                self.threshold = 0.3

        assert build(on_harm="flag", detector=Lazy(0.4, threshold=0.9)).check(HARMFUL).outcome is Outcome.FLAGGED


class TestBuilding:
    """A guard with nothing to check is an error, at once and not at the first answer."""

    @pytest.mark.parametrize("detector", [None, object(), KeywordDetector, "smollm2-135m"], ids=repr)
    @pytest.mark.parametrize("on_error", ["withhold", "pass"])
    def test_no_detector(self, detector, on_error):
        with pytest.raises(ConfigError, match=r"needs a detector with a score\(\) method"):
            Guard(detector=detector, policy=GuardPolicy(on_harm="flag", on_error=on_error))

    def test_no_argument_at_all(self):
        with pytest.raises(TypeError):
            Guard()

    @pytest.mark.parametrize("detoxifier", [None, object(), ScriptedDetoxifier], ids=repr)
    def test_no_detoxifier_although_the_policy_asks_for_rewrites(self, detoxifier):
        with pytest.raises(ConfigError, match="on_harm='detoxify' needs a detoxifier"):
            Guard(detector=KeywordDetector({"bomb"}), detoxifier=detoxifier)

    def test_building_calls_no_model(self):
        class Untouchable:
            threshold = property(lambda self: pytest.fail("read"))
            score = rewrite = warm_up = lambda self, *_: pytest.fail("called")

        Guard(detector=Untouchable(), detoxifier=Untouchable())

    def test_warm_up_loads_both_models_and_only_what_is_needed(self):
        loaded = []

        class Detector(FixedDetector):
            def warm_up(self):
                loaded.append("detector")

        class Detoxifier(ScriptedDetoxifier):
            def warm_up(self):
                loaded.append("detoxifier")

        models = {"detector": Detector(0.1), "detoxifier": Detoxifier(["x"])}
        Guard(**models).warm_up()
        assert loaded == ["detector", "detoxifier"]
        Guard(**models, policy=GuardPolicy(on_harm="withhold")).warm_up()
        assert loaded == ["detector", "detoxifier", "detector"]
        build("x").warm_up()  # models need no warm_up

    def test_a_check_loads_the_detoxifier_only_when_there_is_harm(self):
        loaded = []

        class Lazy(ScriptedDetoxifier):
            def warm_up(self):
                loaded.append(len(self.calls))

        guard = Guard(detector=KeywordDetector({"bomb"}), detoxifier=Lazy(["Roses."]))
        guard.check(Turn(answer="Roses."))
        assert loaded == []
        guard.check(HARMFUL)
        assert loaded == [0]


class TestBatch:
    TURNS = (
        Turn(answer="Roses."),
        Turn(answer="A bomb, a long one " * 30),
        Turn(answer=""),
        Turn(answer="Tulips."),
        Turn(answer="bomb"),
    )

    def test_order_is_kept(self):
        results = build("Vases.").check_batch(self.TURNS)
        assert [result.outcome for result in results] == ["passed", "detoxified", "passed", "passed", "detoxified"]
        assert [result.text for result in results] == ["Roses.", "Vases.", "", "Tulips.", "Vases."]

    def test_one_detector_batch_and_one_batch_an_attempt(self):
        guard = build("A bomb.", "Vases.")
        guard.check_batch(self.TURNS)
        assert [len(turns) for turns in guard.detector.calls] == [4, 2, 2]
        assert [(attempt, len(turns)) for attempt, turns in guard.detoxifier.calls] == [(0, 2), (1, 2)]

    def test_only_open_cases_are_tried_again(self):
        class ShortFirst(ScriptedDetoxifier):
            def rewrite(self, turns, *, attempt=0):
                super().rewrite(turns, attempt=attempt)
                return ["Roses." if len(turn.answer) < 9 or attempt else "bomb" for turn in turns]

        guard = Guard(detector=KeywordDetector({"bomb"}), detoxifier=ShortFirst(["-"]))
        results = guard.check_batch(self.TURNS)
        assert [result.attempts for result in results] == [0, 2, 0, 0, 1]
        assert [len(turns) for _, turns in guard.detoxifier.calls] == [2, 1]

    def test_an_empty_batch_asks_no_model(self):
        guard = build("x", detector=FixedDetector(None))
        assert guard.check_batch([]) == []
        assert guard.check_batch([], origins=[]) == []

    def test_batch_equals_singles(self):
        guard = build("A bomb.", "Vases.")
        singles = [guard.check(turn) for turn in self.TURNS]
        batch = guard.check_batch(self.TURNS)
        assert [comparable(result) for result in batch] == [comparable(result) for result in singles]

    def test_raise_gives_the_first_harmful_answer(self):
        with pytest.raises(HarmfulAnswerError):
            build(on_harm="raise").check_batch(self.TURNS)

    def test_return_exceptions_puts_errors_in_their_places(self):
        verdicts = build(on_harm="raise").check_batch(self.TURNS, return_exceptions=True)
        assert [isinstance(verdict, GuardError) for verdict in verdicts] == [False, True, False, False, True]
        assert verdicts[0].text == "Roses."

    def test_models_cannot_disturb_the_batch_they_are_given(self):
        class Rude(KeywordDetector):
            def score(self, turns):
                assert isinstance(turns, tuple)
                return super().score(turns)

        assert build("Vases.", detector=Rude({"bomb"})).check(HARMFUL).outcome is Outcome.DETOXIFIED


class TestRecords:
    def test_every_check_gives_one_record_with_its_origin(self):
        sink = KeepingSink()
        origins = [Origin(run_id=str(n), integration="cli") for n in range(5)]
        results = build("Vases.", sinks=[sink]).check_batch(TestBatch.TURNS, origins=origins)
        assert [record.id for record in sink.records] == [result.id for result in results]
        assert [record.run_id for record in sink.records] == ["0", "1", "2", "3", "4"]
        assert [record.outcome for record in sink.records] == [result.outcome for result in results]

    def test_without_an_origin_the_record_says_python(self):
        sink = KeepingSink()
        guard = build("Vases.", sinks=[sink])
        guard.check(HARMFUL)
        guard.check(HARMFUL, origin=Origin(question_match="text"))
        assert [(r.integration, r.question_match) for r in sink.records] == [("python", None), ("python", "text")]

    def test_the_origin_has_no_say(self):
        guard = build("Vases.")
        with_origin = guard.check(HARMFUL, origin=Origin(integration="x", question_match="none", tags={"a": "b"}))
        assert comparable(with_origin) == comparable(guard.check(HARMFUL))

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_a_wrong_number_of_origins_is_an_error(self, count):
        with pytest.raises(ValueError, match=f"2 turns came with {count} origins"):
            build("x").check_batch([HARMFUL, HARMFUL], origins=[Origin()] * count)

    @pytest.mark.parametrize("trace_content", [False, True])
    def test_content_is_traced_only_on_demand(self, trace_content):
        sink = KeepingSink()
        guard = Guard(
            detector=KeywordDetector({"bomb"}),
            detoxifier=ScriptedDetoxifier(["Roses."]),
            sinks=[sink],
            trace_content=trace_content,
        )
        guard.check(HARMFUL)
        (record,) = sink.records
        kept = (HARMFUL.question, HARMFUL.answer, "Roses.") if trace_content else (None, None, None)
        assert (record.question, record.answer, record.text) == kept

    def test_a_check_that_raises_is_recorded_too(self):
        sink = KeepingSink()
        with pytest.raises(HarmfulAnswerError):
            build(on_harm="raise", sinks=[sink]).check(HARMFUL)
        assert [record.outcome for record in sink.records] == ["withheld"]


def test_one_guard_serves_many_threads():
    barrier = threading.Barrier(8)
    sink = KeepingSink()
    guard = build("A bomb.", "Roses.", sinks=[sink])

    def work(number):
        barrier.wait(timeout=5)
        texts = [f"bomb {number}" if (number + n) % 3 == 0 else f"tulip {number} {n}" for n in range(20)]
        return texts, [guard.check(Turn(answer=text)) for text in texts]

    with ThreadPoolExecutor(8) as pool:
        for texts, results in pool.map(work, range(8)):
            expected = ["Roses." if "bomb" in text else text for text in texts]
            assert [result.text for result in results] == expected
    assert len({record.id for record in sink.records}) == len(sink.records) == 160


def comparable(result):
    """Everything of a result that does not depend on the clock or on chance."""
    rewrites = [(r.harm_score, r.chars, r.error) for r in result.rewrites]
    return (result.outcome, result.reason, result.text, result.harm_score, result.threshold, rewrites, result.error)


def test_a_changed_guard_shares_the_models_and_differs_in_what_was_named():
    records = []

    class Sink:
        def emit(self, record):
            records.append(record)

    detector = KeywordDetector({"bomb"})
    guard = Guard(detector=detector, detoxifier=ScriptedDetoxifier(["safe"]), policy=GuardPolicy(max_attempts=1))
    other = guard.changed(sinks=[Sink()], on_harm="withhold", refusal="No.")
    assert other.check(Turn(question="q", answer="a bomb")).text == "No."
    assert guard.check(Turn(question="q", answer="a bomb")).text == "safe"
    assert (other.detector, other.policy.max_attempts, len(records)) == (detector, 1, 1)
    with pytest.raises(ValidationError):
        guard.changed(no_such_field=1)
    with pytest.raises(ConfigError, match="rewrite"):
        Guard(detector=detector, policy=GuardPolicy(on_harm="flag")).changed(on_harm="detoxify")
