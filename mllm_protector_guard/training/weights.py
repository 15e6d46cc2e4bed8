"""The trained weights of a model, which may be in parts on several devices."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

__all__ = ["below", "load_trained", "trained_names", "trained_weights"]


def trained_names(model: nn.Module) -> set[str]:
    """The names of the weights that require a gradient."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that require a gradient, whole, on the CPU.

    All processes of a run on several devices must call this at the same point; all but the main one get nothing.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(model, options=options)
    return {name: weight.contiguous() for name, weight in weights.items() if isinstance(weight, Tensor)}


def load_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts whole weights into a model; each process of a run on several devices needs all of them."""
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True, strict=False))


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
