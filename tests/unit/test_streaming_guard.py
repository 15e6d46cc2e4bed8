"""Guarded streams: what leaves, what is decided, and the one record of it, in a loop and in an event loop."""

import asyncio
import contextlib
import doctest
import gc
import threading
import time

import pytest

import mllm_protector_guard.guarded_stream
from mllm_protector_guard import (
    CheckpointError,
    CheckTimeoutError,
    DetectorError,
    Guard,
    GuardError,
    GuardPolicy,
    HarmfulAnswerError,
    ImageInput,
    Origin,
    StreamPolicy,
    Turn,
)
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

REFUSAL = "REFUSAL"
EAGER = StreamPolicy(look_ahead_tokens=0, min_sentence_tokens=0)
HARMLESS = "Plant roses. Water them. Rest."
# From "bomb" on, it is harmful: two sentences have left when the third is judged.
HARMFUL = "Plant roses. Water them. Build a bomb. Then rest. And sleep"
BEFORE = "Plant roses. Water them. "
ON_HARM = ["detoxify", "withhold", "flag", "raise"]
ON_ERROR = ["withhold", "raise", "pass"]


class Keeping:
    def __init__(self):
        self.records = []

    def emit(self, record):
        self.records.append(record)


class Failing(KeywordDetector):
    """Fails on answers that end with a given text."""

    def __init__(self, end, error=None):
        super().__init__({"bomb"})
        self.end, self.error = end, error or RuntimeError("out of memory")

    def score(self, turns):
        if any(turn.answer.endswith(self.end) for turn in turns):
            raise self.error
        return super().score(turns)


def build(detector=None, rewrites=("Lilies.",), **policy):
    sink = Keeping()
    guard = Guard(
        detector=detector or KeywordDetector({"bomb"}),
        detoxifier=ScriptedDetoxifier(rewrites),
        policy=GuardPolicy(refusal=REFUSAL, **policy),
        sinks=[sink],
        trace_content=True,
    )
    return guard, sink


def read(guard, pieces, mode=EAGER, **more):
    """The stream, what left, and the error at its end, if any."""
    stream = guard.stream(pieces, question="q", mode=mode, **more)
    left, error = [], None
    try:
        left.extend(iter(stream))
    except GuardError as raised:
        error = raised
    return stream, left, error


async def aread(guard, pieces, mode=EAGER):
    async def source():
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece

    stream = guard.astream(source(), question="q", mode=mode)
    left, error = [], None
    try:
        async for text in stream:
            left.append(text)
    except GuardError as raised:
        error = raised
    return stream, left, error


def told(result):
    names = ("outcome", "reason", "text", "harm_score", "error", "released_chars", "attempts")
    return tuple(getattr(result, name) for name in names)


class TestHarmless:
    @pytest.mark.parametrize("on_harm", ON_HARM)
    @pytest.mark.parametrize("mode", ["whole", "sentence", "tokens=2", EAGER])
    def test_leaves_as_it_is(self, on_harm, mode):
        guard, sink = build(on_harm=on_harm)
        stream, left, error = read(guard, list(HARMLESS), mode)
        assert ("".join(left), error) == (HARMLESS, None)
        assert told(stream.result) == ("passed", "harmless", HARMLESS, 0.01, None, len(HARMLESS), 0)
        (record,) = sink.records
        assert (record.id, record.answer, record.text) == (stream.result.id, HARMLESS, HARMLESS)
        assert (record.question, record.released_chars) == ("q", len(HARMLESS))

    def test_leaves_sentence_by_sentence_before_the_model_has_written_all(self):
        guard, _ = build()
        written = []

        def model():
            for word in HARMLESS.split(" "):
                written.append(word)
                yield word + " "

        stream = guard.stream(model(), mode=EAGER)
        assert next(stream) == "Plant roses. "
        assert written == ["Plant", "roses.", "Water"]

    def test_whole_leaves_at_once_and_is_judged_as_check_judges(self):
        detector = KeywordDetector({"bomb"})
        guard, _ = build(detector)
        image = ImageInput(content=b"x")
        _, left, _ = read(guard, list(HARMLESS), "whole", images=[image])
        assert left == [HARMLESS]
        assert detector.calls == [(Turn(question="q", answer=HARMLESS, images=(image,)),)]

    @pytest.mark.parametrize("pieces", [[], [""], [" ", "\n"]])
    def test_a_blank_answer_passes_unjudged(self, pieces):
        detector = KeywordDetector({"bomb"})
        guard, sink = build(detector)
        stream, left, _ = read(guard, pieces)
        text = "".join(pieces)
        assert "".join(left) == text
        assert told(stream.result) == ("passed", "blank", text, None, None, len(text), 0)
        assert detector.calls == []
        assert len(sink.records) == 1


class TestHarmful:
    def test_is_rewritten_as_a_whole_after_what_had_left(self):
        guard, sink = build()
        stream, left, error = read(guard, list(HARMFUL))
        assert left == ["Plant roses. ", "Water them. ", "\n\nLilies."]
        text = BEFORE + "\n\nLilies."
        assert (told(stream.result), error) == (
            ("detoxified", "rewritten", text, 0.99, None, len(BEFORE), 1),
            None,
        )
        assert guard.detoxifier.calls == [(0, (Turn(question="q", answer=HARMFUL),))]
        (record,) = sink.records
        assert (record.answer, record.text, record.released_chars) == (HARMFUL, text, len(BEFORE))
        assert (record.rewrite_score, record.reason) == (0.01, "rewritten")

    def test_every_rewrite_is_scored_and_what_stays_harmful_is_withheld(self):
        guard, _ = build(rewrites=["A bomb.", "Bombs."], max_attempts=2)
        stream, left, _ = read(guard, [HARMFUL])
        assert "".join(left) == BEFORE + "\n\nREFUSAL"
        assert told(stream.result)[:2] == ("withheld", "rewrite_rejected")
        assert stream.result.attempts == 2

    def test_a_rest_too_long_to_hold_is_withheld_unwritten(self):
        guard, _ = build()
        stream, left, _ = read(guard, list(HARMFUL), EAGER.model_copy(update={"max_held_chars": 20}))
        assert "".join(left) == BEFORE + "\n\nREFUSAL"
        assert told(stream.result) == (
            ("withheld", "rewrite_rejected", BEFORE + "\n\nREFUSAL", 0.99, None, len(BEFORE), 0)
        )
        assert guard.detoxifier.calls == []

    def test_withhold_ends_the_stream_and_the_model(self):
        guard, sink = build(on_harm="withhold")
        ended = []

        def model():
            try:
                yield from (word + " " for word in HARMFUL.split(" "))
            finally:
                ended.append(True)

        source = model()  # held, so that nothing but the stream can close it
        stream, left, error = read(guard, source)
        assert ("".join(left), error, ended) == (BEFORE + "\n\nREFUSAL", None, [True])
        assert told(stream.result) == ("withheld", "harmful", BEFORE + "\n\nREFUSAL", 0.99, None, len(BEFORE), 0)
        assert sink.records[0].answer == BEFORE + "Build a bomb. "

    def test_raise_comes_after_what_had_left(self):
        guard, sink = build(on_harm="raise")
        stream, left, error = read(guard, list(HARMFUL))
        assert "".join(left) == BEFORE
        assert isinstance(error, HarmfulAnswerError)
        assert error.result is stream.result
        assert told(stream.result) == ("withheld", "harmful", BEFORE + "\n\nREFUSAL", 0.99, None, len(BEFORE), 0)
        assert len(sink.records) == 1

    def test_flag_lets_all_leave(self):
        guard, sink = build(on_harm="flag")
        stream, left, _ = read(guard, list(HARMFUL))
        assert "".join(left) == HARMFUL
        assert told(stream.result) == ("flagged", "harmful", HARMFUL, 0.99, None, len(HARMFUL), 0)
        assert len(guard.detector.calls) == 3
        assert len(sink.records) == 1

    @pytest.mark.parametrize("on_harm", ON_HARM)
    def test_whole_decides_as_check_does(self, on_harm):
        guard, _ = build(on_harm=on_harm)
        stream, left, error = read(guard, list(HARMFUL), "whole")
        checked = guard.check_batch([Turn(question="q", answer=HARMFUL)], return_exceptions=True)[0]
        expected = checked.result if isinstance(checked, GuardError) else checked
        assert type(error) is (type(checked) if isinstance(checked, GuardError) else type(None))
        assert told(stream.result)[:5] == told(expected)[:5]
        assert "".join(left) == ("" if on_harm == "raise" else expected.text)

    def test_a_threshold_is_held(self):
        guard, _ = build(threshold=1.0)
        assert "".join(read(guard, [HARMFUL])[1]) == HARMFUL


class TestErrors:
    @pytest.mark.parametrize("on_harm", ON_HARM)
    def test_withhold_is_the_default(self, on_harm):
        guard, sink = build(Failing("them. "), on_harm=on_harm)
        stream, left, error = read(guard, list(HARMLESS))
        assert ("".join(left), error) == ("Plant roses. \n\nREFUSAL", None)
        assert told(stream.result) == ("withheld", "error", "Plant roses. \n\nREFUSAL", None, "DetectorError", 13, 0)
        assert len(sink.records) == 1

    @pytest.mark.parametrize("on_harm", ON_HARM)
    def test_raise(self, on_harm):
        detector = Failing("them. ")
        guard, sink = build(detector, on_harm=on_harm, on_error="raise")
        stream, left, error = read(guard, list(HARMLESS))
        assert "".join(left) == "Plant roses. "
        assert isinstance(error, DetectorError)
        assert error.__cause__ is detector.error
        assert told(stream.result)[:2] == ("withheld", "error")
        assert len(sink.records) == 1

    def test_pass_lets_the_unjudged_part_leave_and_judges_on(self):
        guard, _ = build(Failing("them. "), on_error="pass")
        stream, left, _ = read(guard, list(HARMLESS))
        assert "".join(left) == HARMLESS
        assert told(stream.result) == ("passed", "harmless", HARMLESS, 0.01, None, len(HARMLESS), 0)
        stream, left, _ = read(guard, list(HARMFUL))
        assert "".join(left) == BEFORE + "\n\nLilies."
        assert stream.result.outcome == "detoxified"

    def test_pass_without_a_last_verdict_is_told(self):
        guard, _ = build(Failing("Rest."), on_error="pass")
        stream, left, _ = read(guard, list(HARMLESS))
        assert "".join(left) == HARMLESS
        assert told(stream.result) == ("passed", "error", HARMLESS, None, "DetectorError", len(HARMLESS), 0)

    @pytest.mark.parametrize("on_error", ON_ERROR)
    def test_what_was_judged_harmful_never_passes_on_an_error(self, on_error):
        guard, _ = build(Failing("Lilies."), on_error=on_error)
        stream, left, error = read(guard, list(HARMFUL))
        assert "".join(left) == BEFORE + ("" if on_error == "raise" else "\n\nREFUSAL")
        assert isinstance(error, DetectorError) == (on_error == "raise")
        assert told(stream.result)[:2] == ("withheld", "error")

    def test_the_time_limit_is_that_of_the_whole_stream(self):
        class Slow(KeywordDetector):
            def score(self, turns):
                time.sleep(0.1)
                return super().score(turns)

        # Three verdicts take 0.3 s; each alone would be quick enough.
        guard, _ = build(Slow({"bomb"}), timeout_s=0.25)
        stream, left, _ = read(guard, list(HARMLESS))
        assert "".join(left) == BEFORE + "\n\nREFUSAL"
        assert told(stream.result)[:2] == ("withheld", "timeout")
        assert stream.result.error == "CheckTimeoutError"
        guard, _ = build(Slow({"bomb"}), timeout_s=0.25, on_error="raise")
        assert isinstance(read(guard, list(HARMLESS))[2], CheckTimeoutError)

    def test_a_setup_that_cannot_work_is_raised_whatever_the_policy(self):
        guard, sink = build(Failing("", CheckpointError("no weights", source="x")), on_error="pass")
        with pytest.raises(CheckpointError):
            next(guard.stream([HARMLESS], mode=EAGER))
        assert sink.records == []

    def test_a_sink_that_fails_holds_nothing_back(self, caplog):
        class Broken:
            def emit(self, record):
                raise OSError("disk full")

        guard = Guard(detector=KeywordDetector({"x"}), policy=GuardPolicy(on_harm="withhold"), sinks=[Broken()])
        assert "".join(guard.stream([HARMLESS])) == HARMLESS
        assert "Broken lost record" in caplog.text

    @pytest.mark.parametrize("piece", [None, b"roses", 3])
    def test_a_piece_that_is_no_text_is_refused(self, piece):
        guard, _ = build()
        stream = guard.stream(["Plant roses. Wa", piece, "End."], mode=EAGER)
        assert next(stream) == "Plant roses. "
        with pytest.raises(TypeError, match=f"must be str, got {type(piece).__name__}"):
            next(stream)

    def test_nothing_is_logged_of_the_texts(self, caplog):
        caplog.set_level("DEBUG")
        guard, _ = build(Failing("them. ", ValueError("roses")), on_error="pass")
        read(guard, list(HARMLESS))
        assert caplog.records
        assert "roses" not in caplog.text


class TestBrokenOff:
    @staticmethod
    def breaking(text):
        yield from text
        raise ConnectionError("secret")

    def test_the_models_error_comes_through_and_what_left_is_on_record(self):
        guard, sink = build()
        stream, left = guard.stream(self.breaking(HARMLESS[:30]), mode=EAGER), []
        with pytest.raises(ConnectionError):
            left.extend(iter(stream))
        (record,) = sink.records
        assert (record.outcome, record.reason, record.error) == ("passed", "harmless", "ConnectionError")
        assert (record.answer, record.text, record.released_chars) == (BEFORE, BEFORE, len(BEFORE))
        assert stream.result.error == "ConnectionError"

    def test_nothing_unjudged_leaves_when_the_model_breaks_off(self):
        guard, sink = build()
        stream = guard.stream(self.breaking("Plant ro"), mode=EAGER)
        with pytest.raises(ConnectionError):
            next(stream)
        assert sink.records == []
        with pytest.raises(RuntimeError, match="once it has ended"):
            _ = stream.result

    def test_a_harmful_answer_that_breaks_off_is_recorded_as_withheld(self):
        guard, sink = build()
        stream = guard.stream(self.breaking(HARMFUL), mode=EAGER)
        assert [next(stream), next(stream)] == ["Plant roses. ", "Water them. "]
        with pytest.raises(ConnectionError):
            next(stream)
        (record,) = sink.records
        assert (record.outcome, record.reason, record.error) == ("withheld", "harmful", "ConnectionError")
        assert (record.answer, record.text) == (HARMFUL, BEFORE)

    def test_a_reader_that_leaves_early_is_recorded_once(self):
        guard, sink = build()
        with guard.stream(list(HARMLESS), mode=EAGER) as stream:
            assert next(stream) == "Plant roses. "
        stream.close()
        (record,) = sink.records
        assert (record.text, record.error) == ("Plant roses. ", "GeneratorExit")

    def test_a_stream_that_is_dropped_is_recorded(self):
        guard, sink = build()
        stream = guard.stream(list(HARMLESS), mode=EAGER)
        next(stream)
        del stream
        gc.collect()
        assert len(sink.records) == 1

    def test_a_flagged_answer_that_breaks_off_is_flagged(self):
        guard, sink = build(on_harm="flag")
        with pytest.raises(ConnectionError):
            list(guard.stream(self.breaking(HARMFUL), mode=EAGER))
        assert (sink.records[0].outcome, sink.records[0].text) == ("flagged", HARMFUL)


class TestAsync:
    @pytest.mark.parametrize("on_error", ON_ERROR)
    @pytest.mark.parametrize("on_harm", ON_HARM)
    @pytest.mark.parametrize("answer", [HARMLESS, HARMFUL, "", HARMLESS.replace("Water", "Fail")])
    async def test_both_ways_agree(self, answer, on_harm, on_error):
        guard, sink = build(Failing("Fail them. "), on_harm=on_harm, on_error=on_error)
        stream, left, error = read(guard, list(answer))
        astream, aleft, aerror = await aread(guard, list(answer))
        assert (aleft, type(aerror), told(astream.result)) == (left, type(error), told(stream.result))
        assert len(sink.records) == 2

    async def test_the_event_loop_stays_free_and_models_run_elsewhere(self):
        threads, go_on = set(), threading.Event()

        class Waiting(KeywordDetector):
            def score(self, turns):
                threads.add(threading.get_ident())
                assert go_on.wait(10.0)
                return super().score(turns)

        guard, _ = build(Waiting({"bomb"}))
        reading = asyncio.create_task(aread(guard, [HARMLESS]))
        while not threads:
            await asyncio.sleep(0.001)
        go_on.set()
        _, left, _ = await reading
        assert "".join(left) == HARMLESS
        assert threading.get_ident() not in threads

    async def test_many_streams_at_once_do_not_mix(self):
        guard, sink = build()
        answers = [f"Plant {number} roses. Build {'bombs' if number % 2 else 'walls'}. End." for number in range(20)]
        read_ = await asyncio.gather(*(aread(guard, list(answer)) for answer in answers))
        for number, (answer, (_, left, _)) in enumerate(zip(answers, read_, strict=True)):
            assert "".join(left) == (f"Plant {number} roses. \n\nLilies." if number % 2 else answer)
        assert len(sink.records) == 20

    async def test_a_cancelled_stream_is_recorded_and_its_source_ends(self):
        guard, sink = build()
        closed = []

        async def source():
            try:
                yield "Plant roses. Wa"
                await asyncio.sleep(60)
            finally:
                closed.append(True)

        async def consume():
            async for text in guard.astream(source(), mode=EAGER):
                left.append(text)

        left = []
        task = asyncio.create_task(consume())
        while not left:
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert closed == [True]
        assert (sink.records[0].text, sink.records[0].error) == ("Plant roses. ", "CancelledError")

    async def test_a_reader_that_leaves_early_is_recorded_and_closes_the_source(self):
        guard, sink = build()
        closed = []

        async def source():
            try:
                for char in HARMLESS:
                    yield char
            finally:
                closed.append(True)

        pieces = source()  # held, so that nothing but the stream can close it
        async with guard.astream(pieces, mode=EAGER) as stream:
            assert await anext(stream) == "Plant roses. "
        assert closed == [True]
        assert stream.result.text == "Plant roses. "
        assert len(sink.records) == 1


class TestUse:
    def test_the_example_runs(self):
        failed, tried = doctest.testmod(mllm_protector_guard.guarded_stream)
        assert (failed, tried) == (0, 5)

    def test_a_result_is_there_at_the_end_only(self):
        guard, _ = build()
        stream = guard.stream([HARMLESS], mode=EAGER)
        with pytest.raises(RuntimeError, match="once it has ended"):
            _ = stream.result
        next(stream)
        with pytest.raises(RuntimeError):
            _ = stream.result
        list(stream)
        assert stream.result.detector_ms > 0
        assert list(stream) == []

    def test_nothing_happens_before_it_is_read(self):
        started = []

        def model():
            started.append(True)
            yield HARMLESS

        guard, sink = build()
        guard.stream(model()).close()
        assert (started, sink.records) == ([], [])

    def test_the_origin_goes_into_the_record(self):
        guard, sink = build()
        list(guard.stream([HARMLESS], origin=Origin(integration="mine", run_id="7")))
        assert (sink.records[0].integration, sink.records[0].run_id) == ("mine", "7")

    def test_models_are_warmed_up_and_the_threshold_is_read_after_that(self):
        class Late(KeywordDetector):
            def warm_up(self):
                self.threshold = 1.0

        guard, _ = build(Late({"bomb"}))
        assert "".join(guard.stream([HARMFUL], mode=EAGER)) == HARMFUL

    def test_an_unknown_mode_is_refused_at_once(self):
        guard, _ = build()
        with pytest.raises(ValueError, match="mode"):
            guard.stream([], mode="words")
