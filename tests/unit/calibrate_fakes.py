"""Detectors whose scores stand in the answers, for the tests of `mllm-protector calibrate`."""

import os
import time
from collections.abc import Sequence

from mllm_protector_guard import Turn


class Reader:
    """Gives the number that an answer begins with; fails where there is none."""

    threshold = 0.5

    def score(self, turns: Sequence[Turn]) -> list[float]:
        return [float(turn.answer.split()[0]) for turn in turns]


class SlowReader(Reader):
    """Takes its time, and leaves a mark for each batch where `CLI_FAKES_CALLS` says."""

    def score(self, turns: Sequence[Turn]) -> list[float]:
        with open(os.environ["CLI_FAKES_CALLS"], "a", encoding="utf-8") as file:
            file.write(f"{len(turns)}\n")
        time.sleep(0.05)
        return super().score(turns)


reader = Reader()
