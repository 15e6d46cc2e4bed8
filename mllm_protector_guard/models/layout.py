"""How weights lie in memory."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["lay_out_by_column"]


def lay_out_by_column(model: nn.Module) -> None:
    """Stores each float32 matrix on a CPU by column; values and shapes stay.

    A rewrite multiplies one row at a time, and reads the weights from memory faster in this order: on an AMD EPYC with
    MKL it took 0.86 of the time in the layers, and 0.57 in the language-model head. Many rows at once take as long as
    before.
    """
    for parameter in model.parameters():
        on_cpu = parameter.device.type == "cpu" and parameter.dtype == torch.float32
        # One that is so already may be another model's too, and stays the same tensor.
        if on_cpu and parameter.dim() == 2 and not parameter.t().is_contiguous():
            parameter.data = parameter.data.t().contiguous().t()
