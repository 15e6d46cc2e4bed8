"""Times what the guard itself costs in LangChain, without a model: microseconds over the same chain without a guard.

The chain is `prompt | model` with a model that answers at once; the detector is a fake that looks for one word. The
chains with and without a guard take turns. With `--peers FOLDER` the guards of other projects are measured in the same
way with their cheapest check, each in an environment of its own that is made in the folder when it is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from contextvars import copy_context
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import Runnable
from plumbing_peers import FORBIDDEN, GUARDS, measure
from rich.console import Console
from rich.table import Table
from rounds import CLOCKS, Spread

from langchain_mllm_protector import ProtectorGuard, capture
from mllm_protector_guard.fakes import KeywordDetector

OURS = "mllm-protector-guard"
STDERR = Console(stderr=True)
PEERS_FILE = Path(__file__).with_name("plumbing_peers.py")


def ours(prompt: Runnable[Any, Any], model: BaseChatModel) -> Runnable[Any, Any]:
    """Our guard with a detector that looks for one word."""
    return prompt | model | ProtectorGuard(detector=KeywordDetector({FORBIDDEN}), on_harm="withhold")


def measured_here(rounds: int, clock: str) -> dict[str, Any]:
    """Our figures, and the versions they were measured with."""
    versions = {package: importlib.metadata.version(package) for package in (OURS, "langchain-core")}
    # The capture of questions sees every chain of the process, and what it costs there is our cost too.
    unguarded = copy_context()
    unguarded.run(capture._capture.set, None)
    return {"versions": versions, "figures": measure(ours, rounds=rounds, clock=clock, unguarded=unguarded)}


def measured_there(peer: str, folder: Path, rounds: int, clock: str) -> dict[str, Any] | None:
    """The figures of a peer from its own environment; None, with a note on stderr, if it has none or fails in it."""
    python = folder / peer / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists() and not _installed(peer, folder / peer, python):
        return None
    STDERR.print(f"measuring {peer}")
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    command = [str(python), "-W", "ignore", str(PEERS_FILE), peer, str(rounds), clock]
    done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)  # noqa: S603 - our own
    if done.returncode:
        STDERR.print(f"{peer} is left out, for it failed:\n{done.stderr[-2000:]}", markup=False)
        return None
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _installed(peer: str, home: Path, python: Path) -> bool:
    STDERR.print(f"installing {peer} into {home}")
    for command in ([sys.executable, "-m", "venv", home], [python, "-m", "pip", "install", "langchain-core", peer]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            python.unlink(missing_ok=True)  # so that the next run tries again
            STDERR.print(f"{peer} is left out, for it cannot be installed:\n{done.stderr[-2000:]}", markup=False)
            return False
    return True


def table(found: dict[str, dict[str, Any]], clock: str) -> Table:
    """Added microseconds of each guard, and how many times ours each of the others adds."""
    result = Table(
        title="Microseconds added to a call, a chunk, or an answer of a batch",
        caption=f"medians (quartiles), {clock} time; times as much as ours",
    )
    result.add_column("what")
    for guard in found:
        result.add_column(guard, justify="right")
    first = found[OURS]["figures"]
    for way, own in first.items():
        cells = [_cell(found[guard]["figures"][way], None if guard == OURS else own) for guard in found]
        result.add_row(way, *cells)
    return result


def _cell(figure: dict[str, Any], own: dict[str, Any] | None) -> str:
    if "error" in figure:
        return str(figure["error"])
    text = Spread(**figure["added_us"]).shown(",.0f" if figure["added_us"]["median"] >= 100 else ",.1f")
    if "chunks" in figure and figure["chunks"] == 1:
        text += ", in one chunk"
    if own is None or "error" in own:
        return text
    return f"{text}, {figure['added_us']['median'] / own['added_us']['median']:,.0f}x"


def main() -> None:
    """Prints one table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="measures other guards in environments made here")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu leaves out what other programs take")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["LANGSMITH_TRACING"] = "false"
    rounds = 5 if options.quick else options.rounds
    found = {OURS: measured_here(rounds, options.clock)}
    for peer in GUARDS if options.peers else ():
        figures = measured_there(peer, options.peers.resolve(), rounds, options.clock)
        if figures is not None:
            found[peer] = figures
    if options.json:
        about = {"python": platform.python_version(), "clock": options.clock, "rounds": rounds}
        print(json.dumps({**about, "guards": found}, indent=2))
        return
    Console().print(table(found, options.clock))


if __name__ == "__main__":
    main()
