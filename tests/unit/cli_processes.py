"""The command as a process of its own, to be killed or interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def start(*args: str | Path | float, calls: Path | None = None, text: bool = False) -> subprocess.Popen[Any]:
    """`mllm-protector` with these arguments; `calls` is where fakes of `cli_fakes` note theirs."""
    return subprocess.Popen(
        [sys.executable, "-m", "mllm_protector_guard.cli", *map(str, args)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
            **({} if calls is None else {"CLI_FAKES_CALLS": str(calls)}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=text,
    )


def wait_for_lines(path: Path, count: int) -> None:
    """Returns when the file has so many lines."""
    for _ in range(4000):  # a busy machine takes its time to start Python
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not get {count} lines")
