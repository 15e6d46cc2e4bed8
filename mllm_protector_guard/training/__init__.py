"""Training of harm detectors and response detoxifiers on the Hugging Face Trainer."""

from mllm_protector_guard.training.config import DetectorRecipe, DetoxifierRecipe, load_recipe, recipe_names
from mllm_protector_guard.training.detector import train_detector
from mllm_protector_guard.training.detoxifier import train_detoxifier

__all__ = ["DetectorRecipe", "DetoxifierRecipe", "load_recipe", "recipe_names", "train_detector", "train_detoxifier"]
