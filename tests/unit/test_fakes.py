"""The fakes do exactly what their docstrings say."""

import pytest

from mllm_protector_guard import Turn
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier


def test_keyword_detector_ignores_case():
    detector = KeywordDetector({"Bomb", "STRASSE"})
    answers = ["a BOMB", "auf der Straße", "a bo mb", ""]
    assert detector.score([Turn(answer=answer) for answer in answers]) == [0.99, 0.99, 0.01, 0.01]


def test_keyword_detector_judges_the_answer_and_not_the_question():
    assert KeywordDetector({"bomb"}).score([Turn(question="bomb?", answer="No.")]) == [0.01]


def test_keyword_detector_remembers_its_calls():
    detector = KeywordDetector({"x"}, threshold=0.7)
    turns = [Turn(answer="a"), Turn(answer="b")]
    detector.score(turns)
    detector.score([])
    assert detector.calls == [tuple(turns), ()]
    assert detector.threshold == 0.7


def test_scripted_detoxifier_follows_its_script():
    detoxifier = ScriptedDetoxifier(["first", "second"])
    turns = [Turn(answer="a"), Turn(answer="b")]
    assert [detoxifier.rewrite(turns, attempt=n) for n in range(4)] == [
        ["first", "first"],
        ["second", "second"],
        ["second", "second"],
        ["second", "second"],
    ]
    assert [attempt for attempt, _ in detoxifier.calls] == [0, 1, 2, 3]
    assert detoxifier.calls[0] == (0, tuple(turns))


def test_scripted_detoxifier_needs_a_script():
    with pytest.raises(ValueError, match="at least one rewrite"):
        ScriptedDetoxifier([])
