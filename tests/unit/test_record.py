"""The record: a fixed schema without texts unless they are asked for."""

import hashlib
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from mllm_protector_guard import GuardRecord, GuardResult, ImageInput, Origin, Outcome, Reason, RewriteAttempt, Turn

MARKER = "xyzzy-4711"
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))


def verdict(text="out", **changes):
    values = {
        "outcome": Outcome.DETOXIFIED,
        "reason": Reason.REWRITTEN,
        "text": text,
        "harm_score": 0.9,
        "threshold": 0.5,
        "rewrites": (
            RewriteAttempt(harm_score=None, chars=0, error="DetoxifierError", duration_ms=2.0),
            RewriteAttempt(harm_score=0.1, chars=3, duration_ms=4.0),
        ),
        "detector_ms": 1.5,
        "detoxifier_ms": 6.0,
    }
    return GuardResult(**{**values, **changes})


def test_holds_what_was_decided_and_why():
    turn = Turn(question="why?", answer="because", images=(ImageInput(content=b"x"),))
    result = verdict()
    origin = Origin(
        integration="langchain", question_match="id", run_id="r", parent_run_id="p", tags={"tenant": "blue"}
    )
    record = GuardRecord.of(turn, result, origin=origin)
    assert record.model_dump(exclude={"rewrites", "time"}) == {
        "schema_version": 1,
        "id": result.id,
        "integration": "langchain",
        "run_id": "r",
        "parent_run_id": "p",
        "tags": {"tenant": "blue"},
        "outcome": "detoxified",
        "reason": "rewritten",
        "error": None,
        "harm_score": 0.9,
        "threshold": 0.5,
        "rewrite_score": 0.1,
        "attempts": 2,
        "question_match": "id",
        "question_known": True,
        "images": 1,
        "question_chars": 4,
        "answer_chars": 7,
        "text_chars": 3,
        "released_chars": None,
        "question_sha256": hashlib.sha256(b"why?").hexdigest(),
        "answer_sha256": hashlib.sha256(b"because").hexdigest(),
        "text_sha256": hashlib.sha256(b"out").hexdigest(),
        "detector_ms": 1.5,
        "detoxifier_ms": 6.0,
        "question": None,
        "answer": None,
        "text": None,
    }
    assert record.time == result.time
    assert [(r.harm_score, r.chars, r.error, r.duration_ms) for r in record.rewrites] == [
        (None, 0, "DetoxifierError", 2.0),
        (0.1, 3, None, 4.0),
    ]


def test_an_unknown_question_is_told_from_an_empty_one():
    unknown = GuardRecord.of(Turn(answer="a"), verdict())
    empty = GuardRecord.of(Turn(question="", answer="a"), verdict())
    assert (unknown.question_known, unknown.question_sha256) == (False, None)
    assert (empty.question_known, empty.question_sha256) == (True, hashlib.sha256(b"").hexdigest())


def test_texts_stay_out_by_default():
    turn = Turn(question=MARKER, answer=MARKER, images=(ImageInput(url=MARKER),))
    record = GuardRecord.of(turn, verdict(text=MARKER))
    assert MARKER not in record.model_dump_json()
    assert MARKER not in repr(record)


def test_kept_texts_stay_out_of_the_repr():
    record = GuardRecord.of(Turn(question=MARKER, answer=MARKER), verdict(text=MARKER), trace_content=True)
    assert (record.question, record.answer, record.text) == (MARKER, MARKER, MARKER)
    assert MARKER not in repr(record)
    assert MARKER not in str(record)


def test_images_are_never_kept():
    turn = Turn(answer="a", images=(ImageInput(url=MARKER), ImageInput(content=MARKER.encode())))
    assert MARKER not in GuardRecord.of(turn, verdict(), trace_content=True).model_dump_json()


@given(text=ANY_TEXT)
@example(text="a\ud83d")
@example(text="\ud83db")
@example(text="\ude00\ud83d")
@example(text="\ufeffbom\x00nul")
def test_any_text_can_be_hashed_kept_and_read_back(text):
    record = GuardRecord.of(Turn(question=text, answer=text), verdict(text=text), trace_content=True)
    assert GuardRecord.model_validate_json(record.model_dump_json()) == record
    if not any("\ud800" <= letter <= "\udfff" for letter in text):
        assert record.answer == text
        assert record.answer_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_lone_surrogates_become_replacement_characters_and_eat_nothing():
    record = GuardRecord.of(Turn(answer="a\ud83db\udc00c\ud83d"), verdict(), trace_content=True)
    assert record.answer == "a\ufffdb\ufffdc\ufffd"


def test_hashes_tell_surrogates_apart():
    one = GuardRecord.of(Turn(answer="\ud83d"), verdict())
    other = GuardRecord.of(Turn(answer="\ud83e"), verdict())
    assert one.answer_sha256 != other.answer_sha256


def test_records_without_a_score_read_back():
    result = verdict(harm_score=None, outcome=Outcome.PASSED, reason=Reason.BLANK, rewrites=())
    line = GuardRecord.of(Turn(answer=""), result).model_dump_json()
    assert json.loads(line)["harm_score"] is None
    assert GuardRecord.model_validate_json(line).outcome == "passed"


def test_unknown_fields_and_versions_are_refused():
    fields = GuardRecord.of(Turn(answer="a"), verdict()).model_dump()
    with pytest.raises(ValidationError):
        GuardRecord(**fields, colour="red")
    with pytest.raises(ValidationError):
        GuardRecord(**{**fields, "schema_version": 2})
