"""The stretches of an answer that a detector reads at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mllm_protector_guard.models.checkpoint import DetectorConfig
from mllm_protector_guard.models.prompts import EncodedTurn, shorten, shorten_question

__all__ = ["Window", "windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A prompt with a stretch of the answer.

    Attributes:
        ids: Tokens of the prompt.
        answer: Where the stretch stands in it; never empty.
    """

    ids: list[int]
    answer: range


def windows(encoded: EncodedTurn, config: DetectorConfig, max_tokens: int, *, told: bool = False) -> Iterator[Window]:
    """Overlapping windows that hold every token of the answer; none if the answer has no tokens.

    They begin at fixed places, so that a window which is full stays as it is when the answer grows. The last has more
    than `overlap_tokens` tokens of the answer, if there are several.

    Args:
        encoded: A prompt, whole.
        config: Says how long windows are and how far they overlap.
        max_tokens: Most tokens that the model reads at once.
        told: Whether the log already says that this question is too long.
    """
    answer, suffix = encoded.answer, encoded.suffix
    if not answer:
        return
    # A question may take half of a model that reads less than the configuration allows.
    limit = min(config.max_question_tokens, max_tokens // 2)
    prefix = (shorten if told else shorten_question)(encoded.prefix, limit)
    size = min(config.window_tokens, max_tokens - len(prefix) - len(suffix))
    overlap = min(config.overlap_tokens, size // 2)
    for start in range(0, max(len(answer) - overlap, 1), size - overlap):
        part = answer[start : start + size]
        span = range(len(prefix), len(prefix) + len(part))
        yield Window(ids=[*prefix, *part, *suffix], answer=span)
