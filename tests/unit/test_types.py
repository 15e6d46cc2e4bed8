"""The values: frozen, keyword-only, and silent about texts."""

import dataclasses
import pickle
from datetime import timedelta

import pytest

from mllm_protector_guard import GuardResult, ImageInput, Origin, Outcome, Reason, RewriteAttempt, Turn

MARKER = "xyzzy-4711"


def result(**changes):
    values = {"outcome": Outcome.PASSED, "reason": Reason.HARMLESS, "text": "t", "harm_score": 0.1, "threshold": 0.5}
    return GuardResult(**{**values, **changes})


def attempt(score):
    return RewriteAttempt(harm_score=score, chars=3, duration_ms=1.0)


@pytest.mark.parametrize(
    "value",
    [
        Turn(answer="a"),
        ImageInput(content=b"x"),
        Origin(),
        attempt(0.1),
        result(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_frozen_keyword_only_and_can_travel(value):
    first = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, first, None)
    with pytest.raises(TypeError):
        type(value)("positional")
    assert pickle.loads(pickle.dumps(value)) == value


def test_unknown_question_is_not_the_empty_one():
    assert Turn(answer="a").question is None
    assert Turn(answer="a") != Turn(question="", answer="a")


@pytest.mark.parametrize("answer", [None, b"bytes", 3, ["block"], {"text": "x"}], ids=lambda v: type(v).__name__)
def test_an_answer_that_is_no_text_is_refused(answer):
    with pytest.raises(TypeError, match=r"Turn\.answer must be str"):
        Turn(answer=answer)


def test_a_question_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match=r"Turn\.question must be str or None, got list"):
        Turn(question=["q"], answer="a")


def test_images_become_a_tuple():
    images = [ImageInput(content=b"x")]
    turn = Turn(answer="a", images=images)
    images.clear()
    assert turn.images == (ImageInput(content=b"x"),)


@pytest.mark.parametrize("given", [{}, {"content": b"x", "url": "u"}], ids=["neither", "both"])
def test_an_image_has_exactly_one_source(given):
    with pytest.raises(ValueError, match="exactly one of"):
        ImageInput(**given)


@pytest.mark.parametrize(
    "value",
    [
        Turn(question=MARKER, answer=MARKER, images=(ImageInput(url=MARKER),)),
        Turn(answer=MARKER),
        ImageInput(url=f"https://example.test/{MARKER}"),
        ImageInput(content=MARKER.encode()),
        result(text=MARKER),
    ],
    ids=["turn", "turn without question", "image url", "image content", "result"],
)
def test_reprs_hold_no_text(value):
    assert MARKER not in repr(value)
    assert MARKER not in str(value)


def test_turn_repr_gives_lengths():
    assert repr(Turn(question="abc", answer="de")) == "Turn(question=<3 chars>, answer=<2 chars>, images=0)"
    assert repr(Turn(answer="")) == "Turn(question=None, answer=<0 chars>, images=0)"


@pytest.mark.parametrize(("score", "harmful"), [(None, None), (0.49, False), (0.5, True), (0.51, True)])
def test_harmful_counts_the_threshold_itself(score, harmful):
    assert result(harm_score=score).harmful is harmful


def test_rewrite_score_is_the_last_one_that_exists():
    assert result().rewrite_score is None
    assert result(rewrites=(attempt(0.9), attempt(0.2), attempt(None))).rewrite_score == 0.2
    assert result(rewrites=(attempt(0.9), attempt(0.2))).attempts == 2


def test_every_result_has_its_own_id_and_a_time_in_utc():
    one, other = result(), result()
    assert one.id != other.id
    assert one.time.utcoffset() == timedelta(0)


def test_outcomes_and_reasons_are_their_words():
    assert {str(outcome) for outcome in Outcome} == {"passed", "detoxified", "withheld", "flagged"}
    assert f"{Reason.REWRITE_REJECTED}" == "rewrite_rejected"
