"""Training of harm detectors and response detoxifiers on the Hugging Face Trainer."""

import importlib.util

from mllm_protector_guard.errors import MissingDependencyError

for _package in ("accelerate", "scipy", "yaml"):
    if importlib.util.find_spec(_package) is None:
        raise MissingDependencyError(_package, "train")

from mllm_protector_guard.training.config import DetectorRecipe, DetoxifierRecipe, load_recipe, recipe_names  # noqa: E402
from mllm_protector_guard.training.detector import train_detector  # noqa: E402
from mllm_protector_guard.training.detoxifier import train_detoxifier  # noqa: E402

__all__ = ["DetectorRecipe", "DetoxifierRecipe", "load_recipe", "recipe_names", "train_detector", "train_detoxifier"]
