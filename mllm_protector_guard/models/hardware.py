"""What the machine is called on which a model runs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cpu_name", "device_name"]


def device_name(device: str = "auto") -> str:
    """The name of the device that `load_detector(device=...)` takes, as reports of times give it.

    Raises:
        ConfigError: The device is unknown or not on this machine.
    """
    import torch

    from mllm_protector_guard.models.device import resolve_device

    resolved = resolve_device(device)
    if resolved.type == "cuda":
        return f"{resolved}: {torch.cuda.get_device_name(resolved)}"
    if resolved.type == "cpu":
        return f"cpu: {cpu_name()}, torch on {torch.get_num_threads()} threads"
    return f"{resolved}: {platform.machine()}"


def cpu_name() -> str:
    """The processor, and how many of its threads this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{next(models, '') or platform.processor() or platform.machine()} ({usable} usable)"
