"""What the timing benchmarks have in common."""

from __future__ import annotations

import argparse

import torch
import transformers

from mllm_protector_guard.models import DEFAULT_MODEL
from mllm_protector_guard.models.detector import TransformersDetector

__all__ = ["QUESTION", "environment", "options_of"]

QUESTION = "What should I know before I plant a garden?"


def options_of(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that say what is timed, how often, and how it is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser


def environment(detector: TransformersDetector) -> dict[str, object]:
    """What a figure depends on besides the options: device, threads and versions."""
    return {
        "device": str(detector._ready().device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
