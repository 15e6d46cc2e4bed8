"""The errors: one root, builtin cousins, useful attributes, no texts."""

import pickle

import pytest

import mllm_protector_guard
from mllm_protector_guard import errors
from mllm_protector_guard.errors import (
    CheckpointError,
    CheckTimeoutError,
    ConfigError,
    DataError,
    DetectorBusyError,
    DetectorError,
    DetoxifierError,
    GuardError,
    HarmfulAnswerError,
    InferenceError,
    MissingDependencyError,
)
from mllm_protector_guard.types import GuardResult, Outcome, Reason


def verdict(harm_score=0.9):
    return GuardResult(
        outcome=Outcome.WITHHELD, reason=Reason.HARMFUL, text="REFUSAL", harm_score=harm_score, threshold=0.5
    )


ONE_OF_EACH = [
    GuardError("m"),
    ConfigError("m"),
    MissingDependencyError("langchain-core", "langchain"),
    CheckpointError("m", source="smollm2-135m"),
    DataError("m", path="rows.jsonl", line=3),
    InferenceError("m"),
    DetectorError("m"),
    DetectorBusyError("m"),
    DetoxifierError("m"),
    CheckTimeoutError("m"),
    HarmfulAnswerError(verdict()),
]


def test_this_file_looks_at_every_error():
    assert sorted(type(error).__name__ for error in ONE_OF_EACH) == sorted(errors.__all__)
    assert set(errors.__all__) <= set(mllm_protector_guard.__all__)


@pytest.mark.parametrize(
    ("kind", "parents"),
    [
        (ConfigError, (GuardError, ValueError)),
        (MissingDependencyError, (GuardError, ImportError)),
        (CheckpointError, (GuardError,)),
        (DataError, (GuardError, ValueError)),
        (DetectorError, (InferenceError, GuardError)),
        (DetectorBusyError, (DetectorError, InferenceError)),
        (DetoxifierError, (InferenceError, GuardError)),
        (CheckTimeoutError, (InferenceError, TimeoutError)),
        (HarmfulAnswerError, (GuardError,)),
    ],
)
def test_family(kind, parents):
    assert all(issubclass(kind, parent) for parent in parents)


def test_a_harmful_answer_is_no_model_failure():
    assert not issubclass(HarmfulAnswerError, InferenceError)


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_errors_travel_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert {k: str(v) for k, v in vars(copy).items()} == {k: str(v) for k, v in vars(error).items()}


def test_missing_dependency_names_the_cure():
    error = MissingDependencyError("langchain-core", "langchain")
    assert 'pip install "mllm-protector-guard[langchain]"' in str(error)
    assert (error.extra, error.name) == ("langchain", "langchain-core")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, "no answer"),
        ({"path": "rows.jsonl"}, "rows.jsonl: no answer"),
        ({"path": "rows.jsonl", "line": 3}, "rows.jsonl:3: no answer"),
        ({"line": 3}, "3: no answer"),
    ],
)
def test_data_error_says_where(where, message):
    error = DataError("no answer", **where)
    assert str(error) == message
    assert (error.path, error.line) == (where.get("path"), where.get("line"))


def test_checkpoint_error_keeps_its_source(tmp_path):
    assert CheckpointError("m", source=tmp_path).source == str(tmp_path)


@pytest.mark.parametrize(("score", "shown"), [(0.9, "harm_score 0.9000"), (None, "harm_score none")])
def test_harmful_answer_error_shows_numbers_only(score, shown):
    result = verdict(score)
    error = HarmfulAnswerError(result)
    assert error.result is result
    assert shown in str(error)
    assert result.id in str(error)
    assert "REFUSAL" not in str(error)
