"""Recipes: everything that decides what a training run gives, in one YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models.checkpoint import BaseReference, Pooling

__all__ = ["DetectorRecipe", "DetoxifierRecipe", "LoraRecipe", "Recipe", "SourceRecipe", "load_recipe", "recipe_names"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraRecipe(_Strict):
    """A low-rank adapter on some decoder layers (Hu et al., arXiv 2106.09685).

    Attributes:
        first_layer: First layer that gets one, from 0; layers below need no backward pass.
        last_layer: Last layer that gets one; None for the last of the model.
        modules: Names of the linear maps inside a layer.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    first_layer: int = Field(default=0, ge=0)
    last_layer: int | None = None
    modules: tuple[str, ...] = _PROJECTIONS

    def target_pattern(self, layers: int) -> str:
        """The regular expression of the module names that get an adapter, in a model of `layers` layers.

        Raises:
            ConfigError: The model has no such layers.
        """
        last = layers - 1 if self.last_layer is None else self.last_layer
        if not self.first_layer <= last < layers:
            raise ConfigError(f"lora layers {self.first_layer} to {last} do not exist in a model of {layers} layers")
        numbers = "|".join(str(number) for number in range(self.first_layer, last + 1))
        return rf"(.*\.)?layers\.({numbers})\..*\.({'|'.join(self.modules)})"


class SourceRecipe(_Strict):
    """How rows of one source are used.

    Attributes:
        rows: At most so many, drawn at random with the recipe's seed; None for all.
        repeat: How often each is seen in an epoch.
        weight: Factor on the loss.
    """

    rows: int | None = Field(default=None, ge=0)
    repeat: int = Field(default=1, ge=1)
    weight: float = Field(default=1.0, gt=0)


class _Common(_Strict):
    """What both recipes hold.

    Attributes:
        start_from: A model of the same kind (catalog name or folder) whose adapter, and head, is trained on; None
            starts afresh.
        sources: By `file:<name before the first dot>`, else by the row's `source:lang` where it has `extra.lang`, else
            by its `source`; other rows follow `other_sources`.
        licences: Regular expression that a row's `extra.licence` must match from its beginning; other rows, and those
            that tell no licence, are left out. None takes all.
        batch_size: Rows a step and device.
        warmup: Share of the steps in which the learning rate rises.
        bf16: Automatic mixed precision; worth it on CPUs with AVX512-BF16 and on GPUs.
        save_steps: How often a run can be resumed from.
    """

    base: BaseReference
    start_from: str | None = None
    template: str = "chatml"
    lora: LoraRecipe = LoraRecipe()
    sources: dict[str, SourceRecipe] = {}
    other_sources: SourceRecipe = SourceRecipe()
    licences: str | None = None
    max_question_tokens: int = Field(default=128, ge=16)
    question_dropout: float = Field(default=0.1, ge=0, le=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    batch_size: int = Field(default=16, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    epochs: float = Field(default=1.0, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    bf16: bool = True
    gradient_checkpointing: bool = False
    save_steps: int = Field(default=100, ge=1)
    seed: int = 17
    revision: str
    licence: str


class DetectorRecipe(_Common):
    """A harm detector.

    Attributes:
        layers: Decoder layers of the base that are kept; None for all.
        max_answer_tokens: Longer answers are read from their beginning while training.
        crop_share: Share of rows whose answer is cut at a random length, so that length tells nothing.
        bury_share: Share of rows whose answer gets harmless answers of other rows before and after it, so that harm
            is found wherever it stands.
        buried_tokens: About how long such an answer becomes.
        disclaimer_share: Share of harmful rows that get a disclaimer before or after the harm, as jailbroken models
            write them, so that a disclaimer is no proof of harmlessness.
        pair_weight: Weight of the ranking term -log sigmoid(r_harmful - r_harmless) over pairs of answers to one
            question, which the official code adds to the cross-entropy; 0 makes no pairs.
        calibration_rows: Rows of the dev files for temperature and threshold, those of `metric_sources` and
            `fpr_sources` first.
        max_fpr: Highest false positive rate on harmless-only dev sources that the threshold may cause.
        start_share: Share of the weights of `start_from` in a mean with the trained ones, which then is the model
            (Wortsman et al., arXiv 2109.01903). The two must not be far apart: a mean of adapters is that of their
            factors, not of their products.
        metric_sources: Dev sources whose F1 the threshold maximises within `max_fpr`; empty for all.
        fpr_sources: The harmless-only dev sources that count for `max_fpr`; empty for all. A source with wrong labels
            does not belong here.
    """

    kind: Literal["detector"] = "detector"
    layers: int | None = Field(default=None, ge=1)
    pooling: Pooling = "mean"
    peak_tokens: int = Field(default=64, ge=1)
    window_tokens: int = Field(default=384, ge=16)
    overlap_tokens: int = Field(default=64, ge=0)
    max_answer_tokens: int = Field(default=192, ge=16)
    crop_share: float = Field(default=0.2, ge=0, le=1)
    bury_share: float = Field(default=0.0, ge=0, le=1)
    buried_tokens: int = Field(default=256, ge=32)
    disclaimer_share: float = Field(default=0.0, ge=0, le=1)
    pair_weight: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    start_share: float = Field(default=0.0, ge=0, lt=1)
    calibration_rows: int = Field(default=2000, ge=1)
    max_fpr: float = Field(default=0.02, gt=0, lt=1)
    metric_sources: tuple[str, ...] = ()
    fpr_sources: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_a_start(self) -> DetectorRecipe:
        if self.start_share and self.start_from is None:
            raise ValueError("start_share needs start_from")
        return self


class DetoxifierRecipe(_Common):
    """A response detoxifier.

    Attributes:
        max_answer_tokens: Longer rejected answers are read from their beginning while training.
        max_rewrite_tokens: Rows with a longer accepted answer are left out.
        max_copied_tokens: Of the checkpoint: longest run of prompt or rewrite that a rewrite may repeat; None for any.
        identity_rows: Harmless answers that are to come back as they are, drawn from the detector's rows.
    """

    kind: Literal["detoxifier"] = "detoxifier"
    max_answer_tokens: int = Field(default=192, ge=16)
    max_rewrite_tokens: int = Field(default=192, ge=16)
    max_copied_tokens: int | None = Field(default=None, ge=1)
    identity_rows: int = Field(default=0, ge=0)


Recipe = DetectorRecipe | DetoxifierRecipe
_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="kind")])


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("mllm_protector_guard.training") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """A checked recipe.

    Args:
        name_or_path: One of `recipe_names()`, or a YAML file.
        overrides: `key=value` or `key.key=value`, values in YAML; they replace the file's.

    Raises:
        ConfigError: There is no such recipe, or a field is wrong.
    """
    path = Path(name_or_path)
    if not path.is_file():
        if str(name_or_path) not in recipe_names():
            raise ConfigError(f"no recipe {str(name_or_path)!r}; give a YAML file or one of {recipe_names()}")
        path = Path(str(resources.files("mllm_protector_guard.training") / "recipes" / f"{name_or_path}.yaml"))
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        for override in overrides:
            _override(fields, override)
        return _ADAPTER.validate_python(fields)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} or one of its overrides is not valid YAML") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"recipe {str(path)!r}: {problems}") from error


def _override(fields: Any, override: str) -> None:
    key, separator, value = override.partition("=")
    *parents, leaf = key.split(".")
    if not separator or not leaf or not isinstance(fields, dict):
        raise ConfigError(f"an override is key=value, got {override!r}")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"override {override!r}: {parent!r} has no fields")
    fields[leaf] = yaml.safe_load(value)
