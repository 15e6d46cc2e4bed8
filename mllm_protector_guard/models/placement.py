"""Where and how a model is put into memory; needs no torch, so that it can be a key before one is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Placement", "Quantization"]

Quantization = Literal["8bit", "4bit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Device, number format and quantization of a model.

    Attributes:
        device: "auto" (cuda, mps, cpu), or a torch device name.
        dtype: "auto" (bfloat16 on cuda, float32 elsewhere), or a torch dtype name.
        device_map: Spreads a large model over devices, as accelerate does ("auto", "balanced", ...).
        quantization: "8bit" or "4bit" through bitsandbytes, on CUDA only.
    """

    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    quantization: Quantization | None = None
