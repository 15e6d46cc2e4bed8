"""One copy in memory of what a detector and a detoxifier on the same base have in common.

A detector in memory holds its layers with its adapter merged in, and pays nothing for sharing them. A detoxifier that
is loaded beside it takes them as they are and corrects each by a product of low rank, its own adapter less the
detector's. A check scores before anything is rewritten, so that the detector is there first.
Nobody writes to a shared weight, so that both may run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from mllm_protector_guard.models.device import resolve_device, resolve_dtype
from mllm_protector_guard.models.placement import Placement

__all__ = ["CorrectedLinear", "HeldBackbone", "LowRank", "find_held", "hold", "low_rank_updates", "merge_beside"]

_ADAPTER = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """`up @ down`, an addition to a weight.

    Attributes:
        down: float32 [rank, inputs].
        up: float32 [outputs, rank], the adapter's scale in it.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldBackbone:
    """The decoder of a detector in memory.

    Attributes:
        weights: By name, as in its `state_dict`; adapters are merged in.
        updates: What was merged into a weight, by the weight's name.
    """

    weights: dict[str, Tensor]
    updates: dict[str, LowRank]


# By the folder of the base and the device; a detector in memory keeps its own alive.
_held: WeakValueDictionary[tuple[Path, torch.device], HeldBackbone] = WeakValueDictionary()


def hold(root: Path, backbone: PreTrainedModel, updates: dict[str, LowRank] | None) -> HeldBackbone | None:
    """What a detoxifier on the base in `root` may share while the caller keeps it; None if it could not undo the merge.

    Only float32: elsewhere the merge has rounded the weights, and a correction would not give the base's back.
    """
    if updates is None or backbone.dtype != torch.float32:
        return None
    held = HeldBackbone(weights=backbone.state_dict(), updates=updates)
    _held[root.resolve(), backbone.device] = held
    return held


def find_held(root: Path, adapter: Path, placement: Placement) -> HeldBackbone | None:
    """The decoder in memory that a model on the base in `root` with this adapter can stand on, if there is one."""
    device = resolve_device(placement.device)
    spread = placement.quantization is not None or placement.device_map is not None
    if spread or resolve_dtype(placement.dtype, device) != torch.float32:
        return None
    held = _held.get((root.resolve(), device))
    # A base in several files is read by transformers alone.
    if held is None or not (root / "model.safetensors").is_file() or not (adapter / "adapter_config.json").is_file():
        return None
    return held if _is_plain(PeftConfig.from_pretrained(str(adapter))) else None


def low_rank_updates(adapted: PeftModel) -> dict[str, LowRank] | None:
    """What merging the adapter would add, by the name of the decoder's weight; None if that is not all it does."""
    if not _is_plain(adapted.peft_config[_ADAPTER]):
        return None
    return {f"{name}.weight": _update(module) for name, module in _adapted_linears(adapted)}


def merge_beside(adapted: PeftModel, held: HeldBackbone) -> PreTrainedModel:
    """The model with its adapter in its own weights, and beside the ones that it shares with `held`."""
    own = low_rank_updates(adapted) or {}
    for name, module in _adapted_linears(adapted):
        if f"{name}.weight" not in held.weights:
            module.merge()
    model: PreTrainedModel = adapted.unload()
    decoder = getattr(model, model.base_model_prefix)
    for name in sorted((own.keys() | held.updates.keys()) & held.weights.keys()):
        path = name.removesuffix(".weight")
        linear = decoder.get_submodule(path)
        decoder.set_submodule(path, CorrectedLinear(linear, add=own.get(name), take_away=held.updates.get(name)))
    return model


class CorrectedLinear(nn.Module):
    """A linear unit on a shared weight, and on what has to be added to that.

    Args:
        linear: Holds the shared weight.
        add: An update that the weight lacks.
        take_away: One that it has and should not.
    """

    def __init__(self, linear: nn.Linear, *, add: LowRank | None, take_away: LowRank | None) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        parts = [(part, sign) for part, sign in ((add, 1.0), (take_away, -1.0)) if part is not None]
        self.down = nn.Parameter(torch.cat([part.down for part, _ in parts]), requires_grad=False)
        self.up = nn.Parameter(torch.cat([sign * part.up for part, sign in parts], dim=1), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs, float [..., outputs], of inputs, float [..., inputs]."""
        correction = nn.functional.linear(nn.functional.linear(inputs, self.down), self.up)
        return nn.functional.linear(inputs, self.weight, self.bias) + correction


def _is_plain(config: PeftConfig) -> bool:
    """Whether the adapter adds products of low rank to linear weights, and changes nothing else."""
    if not isinstance(config, LoraConfig) or config.bias != "none":
        return False
    others = ("modules_to_save", "fan_in_fan_out", "lora_bias", "use_dora", "layer_replication", "target_parameters")
    variants = ("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "use_bdlora", "use_qalora")
    return not any(getattr(config, field, None) for field in (*others, *variants))


def _adapted_linears(adapted: PeftModel) -> Iterator[tuple[str, LoraLinear]]:
    """The units that the adapter changes, by their names in the decoder."""
    model = adapted.get_base_model()
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name.removeprefix(f"{model.base_model_prefix}."), module


def _update(module: LoraLinear) -> LowRank:
    down, up = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
    return LowRank(down=down.detach(), up=up.detach() * module.scaling[_ADAPTER])
