"""Models for the tests of the command line, named there by import strings."""

import os
import sys
import time
from collections.abc import Sequence

from mllm_protector_guard import Turn
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

detector = KeywordDetector({"bomb"})
strict_detector = KeywordDetector({"bomb"}, threshold=0.001)
detoxifier = ScriptedDetoxifier(["still a bomb", "Let us garden."])
stubborn_detoxifier = ScriptedDetoxifier(["still a bomb"])
silent_detoxifier = ScriptedDetoxifier(["  "])
nothing = object()


class Shaky(KeywordDetector):
    """Fails on answers with "crash" and prints as some libraries do."""

    def __init__(self) -> None:
        super().__init__({"bomb"})

    def score(self, turns: Sequence[Turn]) -> list[float]:
        sys.stdout.write("a stray line\n")
        if any("crash" in turn.answer for turn in turns):
            raise RuntimeError(turns[0].answer)
        return super().score(turns)


class ShakyDetoxifier:
    def rewrite(self, turns: Sequence[Turn], *, attempt: int = 0) -> list[str]:
        if any("crash" in turn.answer for turn in turns):
            raise RuntimeError(turns[0].answer)
        return [f"nicer than {turn.answer}" for turn in turns]


class Slow(KeywordDetector):
    """Takes its time, and leaves a mark for each batch where `CLI_FAKES_CALLS` says."""

    def __init__(self) -> None:
        super().__init__({"bomb"})

    def score(self, turns: Sequence[Turn]) -> list[float]:
        with open(os.environ["CLI_FAKES_CALLS"], "a", encoding="utf-8") as file:
            file.write(f"{len(turns)}\n")
        time.sleep(0.05)
        return super().score(turns)


def broken() -> object:
    """Gives something that is no detector."""
    return 3
