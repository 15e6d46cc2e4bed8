"""What to do with an answer once it has a score."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["DEFAULT_REFUSAL", "GuardPolicy", "OnError", "OnHarm"]

OnHarm = Literal["detoxify", "withhold", "flag", "raise"]
OnError = Literal["withhold", "raise", "pass"]

DEFAULT_REFUSAL = "I can't share the answer to this, because it may be harmful. I'm glad to help with something else."


class GuardPolicy(BaseModel):
    """The operator's decisions; frozen, and unknown fields are errors.

    Attributes:
        threshold: Harm scores at or above it are harmful. None takes the detector's own calibrated
            threshold, or 0.5 where it has none.
        on_harm: `detoxify` rewrites and scores again, `withhold` sends the refusal, `flag` lets the
            answer through and marks the result, `raise` raises `HarmfulAnswerError`.
        on_error: For answers that could not be judged: `withhold` (default), `raise`, or `pass`.
            An answer that *was* judged harmful never passes on an error.
        max_attempts: How many rewrites are tried before the answer is withheld.
        timeout_s: Time limit for one check in seconds; a batch of n turns has n times as long.
            Loading models does not count. None sets no limit.
        refusal: What stands in the place of a withheld answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float | None = Field(default=None, ge=0.0, le=1.0, allow_inf_nan=False)
    on_harm: OnHarm = "detoxify"
    on_error: OnError = "withhold"
    max_attempts: int = Field(default=2, ge=1, le=10)
    timeout_s: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    refusal: str = Field(default=DEFAULT_REFUSAL, min_length=1)
