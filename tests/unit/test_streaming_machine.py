"""The state machine of a stream: what is judged, when it leaves, and that chunks have no say in either."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mllm_protector_guard.streaming import (
    Done,
    Hold,
    Judge,
    Release,
    Rewrite,
    Ruling,
    StreamMachine,
    StreamPolicy,
    Withhold,
)

POLICIES = st.builds(
    StreamPolicy,
    mode=st.sampled_from(["whole", "sentence", "tokens=1", "tokens=3"]),
    look_ahead_tokens=st.integers(0, 6),
    min_sentence_tokens=st.integers(0, 4),
    max_sentence_tokens=st.integers(1, 12),
    max_held_chars=st.sampled_from([0, 5, 100_000]),
)
PROSE = st.lists(
    st.sampled_from(["Tea. ", "Is it? ", "cup ", "茶。", "好", "\n", " ", "x", "```\n", "\ud83d", "\ude00", "e\u0301"]),
    max_size=60,
).map("".join)
TEXTS = st.one_of(PROSE, st.text(st.characters(codec=None, exclude_categories=())))
EAGER = StreamPolicy(look_ahead_tokens=0, min_sentence_tokens=0)


def chunked(text, places):
    places = sorted({0, len(text), *(place for place in places if place < len(text))})
    return [text[start:stop] for start, stop in pairwise(places)]


def drive(pieces, policy, rule, replacement="REFUSAL"):
    """Every event but the holds, the released text, and the machine at the end.

    `rule` gives the ruling on the judged text; every release is held against the verdicts before it.
    """
    machine = StreamMachine(policy)
    events, judged, left, open_ = [], "", "", False
    waiting = [*pieces, None]
    while not isinstance(event := machine.poll(), Done):
        if isinstance(event, Hold):
            piece = waiting.pop(0)
            machine.end() if piece is None else machine.add(piece)
            continue
        events.append(event)
        match event:
            case Judge(text):
                assert text
                judged += text
                ruling = rule(judged)
                open_ = ruling is Ruling.OPEN
                machine.judged(ruling)
            case Release(text):
                assert text
                left += text
                replaced = any(isinstance(one, Rewrite | Withhold) for one in events)
                assert open_ or replaced or judged.startswith(left) or not left.strip()
            case Rewrite() | Withhold():
                assert machine.replace(replacement).startswith(left)
    return events, left, machine


def harmless(judged):
    return Ruling.RELEASE


def harmful_from(length, ruling):
    return lambda judged: ruling if len(judged) >= length else Ruling.RELEASE


@given(TEXTS, POLICIES, st.lists(st.integers(0, 200), max_size=10))
def test_a_harmless_answer_leaves_as_it_is_however_it_came(text, policy, places):
    events, left, machine = drive(chunked(text, places), policy, harmless)
    assert left == text == machine.answer == machine.released_text
    assert machine.released == len(text)
    assert (events, left) == drive(list(text), policy, harmless)[:2]
    judged = "".join(event.text for event in events if isinstance(event, Judge))
    assert judged == (text if text.strip() else "")


@given(TEXTS, POLICIES, st.lists(st.integers(0, 200), max_size=10), st.integers(0, 60), st.sampled_from(Ruling))
def test_the_chunks_have_no_say(text, policy, places, length, ruling):
    rule = harmful_from(length, ruling)
    events, left, machine = drive(chunked(text, places), policy, rule)
    other, other_left, other_machine = drive(list(text), policy, rule)
    assert left == other_left
    assert (machine.answer, machine.released) == (other_machine.answer, other_machine.released)
    if ruling is not Ruling.OPEN:  # what is open leaves as it comes
        assert events == other


@given(TEXTS, POLICIES, st.lists(st.integers(0, 200), max_size=10), st.integers(1, 60))
def test_what_was_judged_harmful_never_leaves(text, policy, places, length):
    for ruling in (Ruling.TAKE, Ruling.STOP):
        events, left, machine = drive(chunked(text, places), policy, harmful_from(length, ruling))
        judged = "".join(event.text for event in events if isinstance(event, Judge))
        if len(judged) < length:
            assert left == text
            continue
        assert machine.released < len(judged)
        assert left.startswith(text[: machine.released])
        assert left.endswith("REFUSAL")
        assert left[machine.released : -len("REFUSAL")].strip("`~\n") == ""
        assert text.startswith(machine.answer)


@given(TEXTS, POLICIES, st.integers(0, 60))
def test_an_open_answer_loses_nothing(text, policy, length):
    assert drive(list(text), policy, harmful_from(length, Ruling.OPEN))[1] == text


@given(TEXTS, st.integers(0, 6))
def test_a_piece_is_judged_with_the_text_after_it(text, look_ahead):
    policy = StreamPolicy(look_ahead_tokens=look_ahead, min_sentence_tokens=0, max_sentence_tokens=4)
    judged = left = ""
    for event in drive(list(text), policy, harmless)[0]:
        if isinstance(event, Judge):
            judged += event.text
        else:
            left += event.text
            ahead = judged[len(left) :].encode("utf-8", "surrogatepass")
            assert len(ahead) >= 4 * look_ahead or left == text


def test_sentences_leave_one_by_one():
    machine = StreamMachine(EAGER)
    machine.add("It rains. Take")
    assert machine.poll() == Judge("It rains. ")
    assert machine.poll() == Judge("It rains. ")
    machine.judged(Ruling.RELEASE)
    assert machine.poll() == Release("It rains. ")
    assert machine.poll() == Hold()
    machine.add(" a coat.")
    assert machine.poll() == Hold()
    machine.end()
    assert machine.poll() == Judge("Take a coat.")
    machine.judged(Ruling.RELEASE)
    assert machine.poll() == Release("Take a coat.")
    assert machine.poll() == Done()


def test_whole_judges_once():
    events, _, _ = drive(list("One. Two. Three."), StreamPolicy(mode="whole"), harmless)
    assert events == [Judge("One. Two. Three."), Release("One. Two. Three.")]


def test_tokens_are_cut_by_size():
    events, _, _ = drive(list("aaaabbbbccc"), StreamPolicy(mode="tokens=1", look_ahead_tokens=0), harmless)
    assert [event.text for event in events[::2]] == ["aaaa", "bbbb", "ccc"]


def test_a_long_default_answer_leaves_before_its_end():
    sentence = "The kettle is on the stove, and the water will boil soon. "
    events, left, _ = drive([sentence * 20], StreamPolicy(), harmless)
    assert left == sentence * 20
    # Of 58 bytes each, a sentence waits for the two after it: 96 bytes are looked ahead to.
    assert events[:4] == [Judge(sentence)] * 3 + [Release(sentence)]


@pytest.mark.parametrize("text", ["", " ", "\n\n  \t"])
def test_a_blank_answer_is_not_judged(text):
    events, left, _ = drive(list(text), EAGER, harmless)
    assert left == text
    assert not [event for event in events if isinstance(event, Judge)]


@pytest.mark.parametrize(
    ("released", "between"),
    [
        ("Tea. ", "\n\n"),
        ("Tea\n", "\n"),
        ("Tea\n\n", ""),
        ("```\na = 1\n", "```\n\n"),
        ("~~~~\na = 1\n\n", "~~~~\n\n"),
        ("```\na = 1\n```\n", "\n"),
    ],
)
def test_what_replaces_the_rest_stands_in_a_paragraph_of_its_own(released, between):
    rule = harmful_from(len(released) + 1, Ruling.STOP)
    assert drive([released, "Bad"], EAGER, rule)[1] == f"{released}{between}REFUSAL"


def test_a_code_block_that_is_cut_by_size_is_closed_on_a_line_of_its_own():
    policy = StreamPolicy(mode="tokens=3", look_ahead_tokens=0)
    assert drive(["```\naaaaaaaa", "bbbb"], policy, harmful_from(13, Ruling.STOP))[1] == "```\naaaaaaaa\n```\n\nREFUSAL"


def test_nothing_stands_before_a_replacement_of_all():
    assert drive(["  Bad. Worse."], EAGER, harmful_from(1, Ruling.STOP))[1] == "REFUSAL"


def test_a_stop_reads_no_further():
    machine = StreamMachine(EAGER)
    machine.add("Bad. Worse. Wor")
    assert machine.poll() == Judge("Bad. ")
    machine.judged(Ruling.STOP)
    machine.add("st.")
    assert machine.poll() == Withhold()
    assert machine.answer == "Bad. "


def test_the_rest_is_taken_in_for_a_rewrite():
    events, left, machine = drive(["Tea. Bad. ", "More. ", "End"], EAGER, harmful_from(6, Ruling.TAKE))
    assert events[-2:] == [Rewrite(), Release("\n\nREFUSAL")]
    assert (left, machine.answer, machine.released) == ("Tea. \n\nREFUSAL", "Tea. Bad. More. End", 5)


@pytest.mark.parametrize(("most", "kind"), [(13, Withhold), (14, Rewrite)])
def test_a_rest_that_outgrows_the_limit_is_not_rewritten(most, kind):
    policy = EAGER.model_copy(update={"max_held_chars": most})
    events, _, machine = drive(["Tea. Bad. ", "More. ", "End"], policy, harmful_from(6, Ruling.TAKE))
    assert isinstance(events[-2], kind)
    assert machine.answer == "Tea. Bad. More. End"[: 5 + most]


def test_a_ruling_is_taken_once_and_only_when_asked_for():
    machine = StreamMachine(EAGER)
    machine.add("Tea. Bad. End")
    with pytest.raises(ValueError, match="answers a Judge"):
        machine.judged(Ruling.RELEASE)
    assert machine.poll() == Judge("Tea. ")
    machine.judged(Ruling.RELEASE)
    with pytest.raises(ValueError, match="answers a Judge"):
        machine.judged(Ruling.RELEASE)


def test_an_ended_answer_takes_no_more():
    machine = StreamMachine(EAGER)
    machine.end()
    with pytest.raises(ValueError, match="has ended"):
        machine.add("x")


def test_events_hold_their_texts_to_themselves():
    assert "secret" not in repr([Judge("secret"), Release("secret")])


@pytest.mark.parametrize("mode", ["", "words", "tokens", "tokens=0", "tokens=-1", "tokens=x", "Whole", "whole\n"])
def test_unknown_modes_are_refused(mode):
    with pytest.raises(ValidationError, match="mode"):
        StreamPolicy(mode=mode)
