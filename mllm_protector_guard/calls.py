"""Calls of a detector and a detoxifier whose failures stay with the turn that caused them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

from mllm_protector_guard.errors import (
    CheckpointError,
    CheckTimeoutError,
    ConfigError,
    DetectorError,
    DetoxifierError,
    InferenceError,
    MissingDependencyError,
)
from mllm_protector_guard.ports import Detoxifier, HarmDetector
from mllm_protector_guard.timelimit import TimeLimit
from mllm_protector_guard.types import Turn

__all__ = ["harm_score_of", "has_method", "name_of", "probability", "rewrite", "score", "warm_up"]

# A model that cannot work at all is a fault of the setup; no policy may take it for a fault of one answer.
_SETUP_ERRORS = (CheckpointError, ConfigError, MissingDependencyError)


def score(detector: HarmDetector, turns: Sequence[Turn], limit: TimeLimit) -> list[float | InferenceError]:
    """P(harmful) of each answer, [0, 1], or the error in its place.

    A batch that fails is scored again one by one, so that neighbours do not suffer.

    Raises:
        CheckpointError, ConfigError, MissingDependencyError: The detector cannot work at all.
    """
    if not turns:
        return []
    try:
        scores = list(limit.run(lambda: detector.score(tuple(turns))))
        if len(scores) != len(turns):
            raise DetectorError(f"{name_of(detector)} gave {len(scores)} scores for {len(turns)} turns")
    except _SETUP_ERRORS:
        raise
    except CheckTimeoutError as error:
        return [error for _ in turns]
    except Exception as error:
        if len(turns) > 1:
            return [one for turn in turns for one in score(detector, [turn], limit)]
        return [_as_inference_error(error, DetectorError, detector)]
    return [_checked(value, detector) for value in scores]


def rewrite(
    detoxifier: Detoxifier, turns: Sequence[Turn], attempt: int, limit: TimeLimit
) -> list[str | InferenceError]:
    """A rewrite of each answer, or the error in its place; a batch that fails is tried again one by one.

    Raises:
        CheckpointError, ConfigError, MissingDependencyError: The detoxifier cannot work at all.
    """
    try:
        texts = limit.run(lambda: detoxifier.rewrite(tuple(turns), attempt=attempt))
        rewrites: list[object] = [] if isinstance(texts, str) else list(texts)
        if len(rewrites) != len(turns):
            raise DetoxifierError(f"{name_of(detoxifier)} gave {len(rewrites)} rewrites for {len(turns)} turns")
    except _SETUP_ERRORS:
        raise
    except CheckTimeoutError as error:
        return [error for _ in turns]
    except Exception as error:
        if len(turns) > 1:
            return [one for turn in turns for one in rewrite(detoxifier, [turn], attempt, limit)]
        return [_as_inference_error(error, DetoxifierError, detoxifier)]
    return [
        text if isinstance(text, str) else DetoxifierError(f"{name_of(detoxifier)} gave {name_of(text)}, not str")
        for text in rewrites
    ]


def harm_score_of(call: Callable[[], float], detector: HarmDetector, limit: TimeLimit) -> float | InferenceError:
    """P(harmful), [0, 1], that `call` gives for one answer, or the error in its place.

    Raises:
        CheckpointError, ConfigError, MissingDependencyError: The detector cannot work at all.
    """
    try:
        return _checked(limit.run(call), detector)
    except _SETUP_ERRORS:
        raise
    except Exception as error:
        return _as_inference_error(error, DetectorError, detector)


def warm_up(model: object) -> None:
    """Loads what `model` needs, if it has a way to."""
    load = getattr(model, "warm_up", None)
    if callable(load):
        load()


def probability(value: object) -> float | None:
    """`value` as a float if it is a real number in [0, 1], else None."""
    if isinstance(value, Real) and 0.0 <= float(value) <= 1.0:  # false for NaN
        return float(value)
    return None


def has_method(model: object, name: str) -> bool:
    """Whether `name` can be called on `model`; false for a class, on which every call would fail."""
    return not isinstance(model, type) and callable(getattr(model, name, None))


def name_of(value: object) -> str:
    """The class name of `value`, which unlike its repr holds no text."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _checked(value: object, detector: HarmDetector) -> float | DetectorError:
    number = probability(value)
    if number is not None:
        return number
    given = repr(float(value)) if isinstance(value, Real) else name_of(value)
    return DetectorError(f"{name_of(detector)} gave {given}; a harm score is a finite number in [0, 1]")


def _as_inference_error(error: Exception, kind: type[InferenceError], model: object) -> InferenceError:
    if isinstance(error, InferenceError):
        return error
    wrapped = kind(f"{name_of(model)} failed with {name_of(error)}")
    wrapped.__cause__ = error
    return wrapped
