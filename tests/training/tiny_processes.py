"""Training runs in processes of their own, and what is done to the trainer in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs an interpreter that can import what the tests can."""
    tests = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        timeout=1500,
        check=False,
        env={**os.environ, "PYTHONPATH": tests, **environment},
    )


def kill_in_step(number: int) -> None:
    """Lets this process be killed when its training comes to this step, counted from 1."""
    steps = 0
    plain = Trainer.training_step

    def training_step(*given: Any, **more: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*given, **more)

    Trainer.training_step = training_step


def keep_gradients(patch: Callable[[Any, str, Any], None] = setattr) -> list[list[Tensor]]:
    """The gradients of each step to come, before they are clipped; the list grows with the steps.

    Args:
        patch: Sets an attribute, as `monkeypatch.setattr` does.
    """
    steps: list[list[Tensor]] = []
    clip = Accelerator.clip_grad_norm_

    def keep(accelerator: Any, parameters: Any, *given: Any, **more: Any) -> Any:
        parameters = list(parameters)
        steps.append([p.grad.clone() for p in parameters if p.grad is not None])
        return clip(accelerator, parameters, *given, **more)

    patch(Accelerator, "clip_grad_norm_", keep)
    return steps
