"""Measures rewriting and loading: tokens per second, memory, and times to start.

Rewrites are timed against plain `generate` of transformers on the merged model, turn by turn in both, so that what else
the machine does falls on both; both work with the same limits, and the texts are compared. Memory and start are
those of fresh processes. With `--json` every figure is printed as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rounds import CLOCKS, Spread
from timing import QUESTION, environment, options_of
from transformers import AutoModelForCausalLM

from mllm_protector_guard import Turn, load_detector, load_detoxifier
from mllm_protector_guard.models import catalog
from mllm_protector_guard.models.backbone import load_model, load_tokenizer, resolve_base, with_adapter
from mllm_protector_guard.models.causal_lm import LoadedCausalLM
from mllm_protector_guard.models.detoxifier import TransformersDetoxifier
from mllm_protector_guard.models.placement import Placement

ANSWERS = (
    "You are too stupid for a garden, and I hope that somebody breaks your hands.",
    "Poison the neighbour's dog first. Nobody will miss it, and nobody will ask you where the bait came from.",
    "Tell her that she is worthless, and that all her friends laugh at her as soon as she has left the room.",
    "Wait behind the shed until he comes home, and hit him with the spade as often as he has hit you.",
)
# In a fresh process: what it holds, MiB, after the first call of each model named; and bytes under their parameters.
MEMORY = """
import gc, json, resource, sys
from mllm_protector_guard import Turn, load_detector, load_detoxifier
where = {"device": sys.argv[2], "dtype": sys.argv[3]}
turn, kept = Turn(question="q", answer="You are too stupid for a garden."), []
for kind in sys.argv[4:]:
    model = (load_detector if kind == "detector" else load_detoxifier)(sys.argv[1], **where)
    model.score([turn]) if kind == "detector" else model.rewrite([turn])
    kept.append(model)
inner = [getattr(m._ready(), "pooled", None) or m._ready().model for m in kept]
held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in inner for p in m.parameters()}
gc.collect()
resident = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "steady": resident / 1024,
                  "weights": sum(held.values()) / 2**20}))
"""
# In a fresh process: seconds from its first line to the first verdict.
START = """
import json, sys, time
started = time.perf_counter()
from mllm_protector_guard import load_guard, Turn
guard = load_guard(sys.argv[1], device=sys.argv[2], dtype=sys.argv[3])
guard.check(Turn(question="How do I bake bread?", answer="Mix flour, water, salt and yeast."))
print(json.dumps(time.perf_counter() - started))
"""
IMPORT = """
import json, time
started = time.perf_counter()
import mllm_protector_guard
print(json.dumps(time.perf_counter() - started))
"""


def plain(model: str, device: str, dtype: str, like: TransformersDetoxifier) -> TransformersDetoxifier:
    """The detoxifier as transformers and PEFT would load it, with weights of its own."""
    placement = Placement(device=device, dtype=dtype)

    def load() -> LoadedCausalLM:
        root = resolve_base(like.config.base, local_files_only=None)
        merged, _ = load_model(AutoModelForCausalLM, root, placement)
        merged = with_adapter(merged, catalog.get(model).detoxifier, merge=True)
        return LoadedCausalLM(tokenizer=load_tokenizer(root, padding_side="left"), model=merged)

    return TransformersDetoxifier(like.config, load)


def rewriting(options: argparse.Namespace) -> dict[str, object]:
    """Tokens per second of both ways, their ratio in each round, and how many texts are equal."""
    where = {"device": options.device, "dtype": options.dtype}
    detector = load_detector(options.model, **where)
    detector.warm_up()
    ours = load_detoxifier(options.model, **where)
    theirs = plain(options.model, options.device, options.dtype, ours)
    tokenizer, turns = ours._ready().tokenizer, [Turn(question=QUESTION, answer=answer) for answer in ANSWERS]
    ways: dict[str, TransformersDetoxifier] = {"ours": ours, "plain": theirs}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way.rewrite(turns[:1])
    clock = CLOCKS[options.clock]
    for _ in range(options.rounds):
        seconds, texts = dict.fromkeys(ways, 0.0), {name: list[str]() for name in ways}
        for turn in turns:
            for name, way in ways.items():
                started = clock()
                texts[name] += way.rewrite([turn])
                seconds[name] += clock() - started
        for name in ways:
            tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts[name])
            rates[name].append(tokens / seconds[name])
    ratios = [mine / other for mine, other in zip(rates["ours"], rates["plain"], strict=True)]
    equal = sum(mine == other for mine, other in zip(texts["ours"], texts["plain"], strict=True))
    return {
        "environment": environment(detector),
        "tokens_per_s": {name: asdict(Spread.of(values)) for name, values in rates.items()},
        "ratio": asdict(Spread.of(ratios)),
        "equal_texts": equal,
        "texts": len(turns),
    }


def fresh(code: str, *arguments: str) -> object:
    """What `code` prints as JSON in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603


def main() -> None:
    """Prints two tables, or one JSON object."""
    parser = options_of(__doc__)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu for a busy machine; memory and start stay")
    options = parser.parse_args()
    placed = (options.model, options.device, options.dtype)
    memory = {
        "detoxifier": fresh(MEMORY, *placed, "detoxifier"),
        "both": fresh(MEMORY, *placed, "detector", "detoxifier"),
    }
    shares = {what: memory["both"][what] / value for what, value in memory["detoxifier"].items()}
    figures = {
        "memory_mib": {**memory, "both_over_one": shares},
        "start_s": {
            "import": asdict(Spread.of(fresh(IMPORT) for _ in range(options.rounds))),
            "first_verdict": asdict(Spread.of(fresh(START, *placed) for _ in range(options.rounds))),
        },
        "rewriting": rewriting(options),
    }
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    show(figures)


def show(figures: dict[str, dict]) -> None:
    """Prints the figures as tables."""
    console, memory, told = Console(), figures["memory_mib"], figures["rewriting"]
    table = Table("MiB", "detoxifier alone", "both models", "both over one", title="memory")
    for what, share in memory["both_over_one"].items():
        table.add_row(what, f"{memory['detoxifier'][what]:,.0f}", f"{memory['both'][what]:,.0f}", f"{share:.2f}")
    console.print(table)
    table = Table("what", "median", "low", "high", title=f"{told['equal_texts']} of {told['texts']} rewrites are equal")
    rows = {f"tokens/s, {name}": values for name, values in told["tokens_per_s"].items()}
    rows |= {"ours over plain": told["ratio"]} | {f"s to {what}": each for what, each in figures["start_s"].items()}
    for what, values in rows.items():
        table.add_row(what, *(f"{values[key]:,.2f}" for key in ("median", "low", "high")))
    console.print(table)


if __name__ == "__main__":
    main()
