"""A detector and a detoxifier without models, for tests of code that uses the guard."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mllm_protector_guard.types import Turn

__all__ = ["KeywordDetector", "ScriptedDetoxifier"]


class KeywordDetector:
    """Scores an answer 0.99 if it holds one of the keywords (in any case), else 0.01.

    Attributes:
        calls: The turns of every `score` call, in order.
    """

    def __init__(self, keywords: Collection[str], *, threshold: float = 0.5) -> None:
        self.keywords = frozenset(keyword.casefold() for keyword in keywords)
        self.threshold = threshold
        self.calls: list[tuple[Turn, ...]] = []

    def score(self, turns: Sequence[Turn]) -> list[float]:
        """0.99 for an answer with a keyword, else 0.01."""
        self.calls.append(tuple(turns))
        return [0.99 if any(k in turn.answer.casefold() for k in self.keywords) else 0.01 for turn in turns]


class ScriptedDetoxifier:
    """Writes given texts: the first at attempt 0, the second at attempt 1, the last ever after.

    Attributes:
        calls: Attempt number and turns of every `rewrite` call, in order.
    """

    def __init__(self, rewrites: Sequence[str]) -> None:
        if not rewrites:
            raise ValueError("give ScriptedDetoxifier at least one rewrite")
        self.rewrites = tuple(rewrites)
        self.calls: list[tuple[int, tuple[Turn, ...]]] = []

    def rewrite(self, turns: Sequence[Turn], *, attempt: int = 0) -> list[str]:
        """The text of this attempt for every turn."""
        self.calls.append((attempt, tuple(turns)))
        return [self.rewrites[min(attempt, len(self.rewrites) - 1)]] * len(turns)
