"""Training of harm detectors and response detoxifiers on the Hugging Face Trainer; the data for it; calibration."""

import importlib.util
from typing import TYPE_CHECKING, Any

from mllm_protector_guard.errors import MissingDependencyError

for _package in ("accelerate", "scipy", "yaml"):
    if importlib.util.find_spec(_package) is None:
        raise MissingDependencyError(_package, "train")

from mllm_protector_guard.training.config import DetectorRecipe, DetoxifierRecipe, load_recipe, recipe_names  # noqa: E402

if TYPE_CHECKING:
    from mllm_protector_guard.training.detector import train_detector
    from mllm_protector_guard.training.detoxifier import train_detoxifier

__all__ = ["DetectorRecipe", "DetoxifierRecipe", "load_recipe", "recipe_names", "train_detector", "train_detoxifier"]


def __getattr__(name: str) -> Any:
    # Files can be checked and made, and thresholds chosen, without torch and transformers.
    if name in ("train_detector", "train_detoxifier"):
        return getattr(importlib.import_module(f"{__name__}.{name.removeprefix('train_')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
