"""The policy refuses what cannot work."""

import pytest
from pydantic import ValidationError

from mllm_protector_guard import DEFAULT_REFUSAL, GuardPolicy


def test_defaults_fail_closed():
    policy = GuardPolicy()
    assert (policy.on_harm, policy.on_error) == ("detoxify", "withhold")
    assert (policy.threshold, policy.timeout_s, policy.max_attempts) == (None, None, 2)
    assert policy.refusal == DEFAULT_REFUSAL


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": -0.01},
        {"threshold": 1.01},
        {"threshold": float("nan")},
        {"threshold": "high"},
        {"on_harm": "ignore"},
        {"on_error": "flag"},
        {"max_attempts": 0},
        {"max_attempts": 11},
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": float("inf")},
        {"timeout_s": float("nan")},
        {"refusal": ""},
        {"treshold": 0.5},
    ],
    ids=lambda wrong: "-".join(f"{k}={v}" for k, v in wrong.items()),
)
def test_wrong_settings_are_errors(wrong):
    with pytest.raises(ValidationError):
        GuardPolicy(**wrong)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_both_ends_of_the_threshold_are_allowed(threshold):
    assert GuardPolicy(threshold=threshold).threshold == threshold


def test_is_frozen_and_hashable():
    policy = GuardPolicy()
    with pytest.raises(ValidationError):
        policy.threshold = 0.9
    assert hash(policy) == hash(GuardPolicy())


def test_round_trips_through_json():
    policy = GuardPolicy(threshold=0.3, on_harm="flag", on_error="pass", max_attempts=3, timeout_s=1.5, refusal="No.")
    assert GuardPolicy.model_validate_json(policy.model_dump_json()) == policy
