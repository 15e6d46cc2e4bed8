"""Our checkpoint format: a folder with `guard.json`, a PEFT adapter and, for detectors, a linear head."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from mllm_protector_guard.errors import CheckpointError

__all__ = [
    "ADAPTER_FILE",
    "CONFIG_FILE",
    "HEAD_FILE",
    "BaseReference",
    "CalibrationRecord",
    "CheckpointConfig",
    "DetectorConfig",
    "DetoxifierConfig",
    "Pooling",
    "read_config",
    "require_safetensors",
    "write_config",
]

CONFIG_FILE = "guard.json"
HEAD_FILE = "head.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
Pooling = Literal["mean", "last", "peak"]
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class BaseReference(_Strict):
    """The pretrained model under an adapter.

    Attributes:
        name: A catalog name, a folder, or a hub id.
        revision: Commit of a hub id.
        sha256: Of the file the base was made from (catalog) or of its `model.safetensors` (folder, hub).
    """

    name: str
    revision: str | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


class _Common(_Strict):
    """What detectors and detoxifiers share.

    Attributes:
        base: The model under the adapter.
        template: Name of the prompt template, see `prompts.py`.
        max_question_tokens: A longer question is shortened in its middle, with a warning in the log.
        revision: Version of these weights.
        licence: SPDX expression for these weights.
        metrics: Measured figures by data set, as the model card tells them.
    """

    schema_version: Literal[1] = 1
    base: BaseReference
    template: str
    max_question_tokens: int = Field(default=512, ge=16)
    revision: str
    licence: str
    metrics: dict[str, dict[str, float]] = {}


class CalibrationRecord(_Strict):
    """How `mllm-protector calibrate` chose the threshold and the temperature.

    Attributes:
        bound: What is promised about the false positive rate; see `training/calibrate.py`.
        max_fpr: The most that it may be, in (0, 1).
        confidence: Of the `clopper-pearson` bound; None for `conformal`.
        prefer: `guarantee`: the lowest threshold of the bound; `f1`: the one from there upwards with the best F1.
        safe_rows: Safe answers that were scored or failed.
        safe_flagged: How many of them are at or above the threshold.
        safe_sha256: Of each file of safe answers.
        labelled_rows: Labelled answers that the temperature was fitted on.
        labelled_sha256: Of each file of labelled answers.
        ece_before: Expected calibration error on the labelled answers, [0, 1]; None without them.
        ece_after: The same after it, each answer with a temperature fitted on others.
        date: Day of the calibration, UTC.
    """

    bound: Literal["clopper-pearson", "conformal"]
    max_fpr: float = Field(gt=0.0, lt=1.0)
    confidence: float | None = Field(default=None, gt=0.0, lt=1.0)
    prefer: Literal["guarantee", "f1"] = "guarantee"
    safe_rows: int = Field(ge=1)
    safe_flagged: int = Field(ge=0)
    safe_sha256: tuple[_Sha256, ...]
    labelled_rows: int = Field(default=0, ge=0)
    labelled_sha256: tuple[_Sha256, ...] = ()
    ece_before: float | None = Field(default=None, ge=0.0, le=1.0)
    ece_after: float | None = Field(default=None, ge=0.0, le=1.0)
    date: datetime.date


class DetectorConfig(_Common):
    """`guard.json` of a harm detector.

    Attributes:
        layers: How many decoder layers of the base are run; None for all.
        pooling: `mean` over the answer's tokens, the `last` one, or the `peak`: the worst mean of any
            `peak_tokens` neighbouring tokens.
        peak_tokens: Length of the stretch that `peak` takes the mean of; a shorter answer is one stretch.
        polarity: What a high logit means.
        threshold: Harm scores at or above it are harmful.
        temperature: The logit is divided by it before the sigmoid.
        window_tokens: Longest stretch of an answer, in tokens, that is scored at once.
        overlap_tokens: How many tokens neighbouring windows share.
        calibration: How threshold and temperature were chosen, if not in training.
    """

    kind: Literal["detector"] = "detector"
    layers: int | None = Field(default=None, ge=1)
    pooling: Pooling = "mean"
    peak_tokens: int = Field(default=64, ge=1)
    polarity: Literal["harmful", "harmless"] = "harmful"
    threshold: float = Field(default=0.5, gt=0.0, lt=1.0)
    temperature: float = Field(default=1.0, gt=0.0)
    window_tokens: int = Field(default=384, ge=16)
    overlap_tokens: int = Field(default=64, ge=0)
    calibration: CalibrationRecord | None = None

    @model_validator(mode="after")
    def _windows_advance(self) -> Self:
        if self.overlap_tokens >= self.window_tokens:
            raise ValueError("overlap_tokens must be less than window_tokens")
        if self.pooling == "peak" and self.polarity != "harmful":
            raise ValueError("pooling 'peak' takes the highest logit for the worst, which needs polarity 'harmful'")
        return self


class DetoxifierConfig(_Common):
    """`guard.json` of a response detoxifier.

    Attributes:
        max_answer_tokens: A longer harmful answer is not rewritten, and so withheld.
        max_new_tokens: Longest rewrite; one that does not end by then is discarded.
        max_copied_tokens: Longest run of tokens that a rewrite may share with the prompt or hold twice; None for any.
    """

    kind: Literal["detoxifier"] = "detoxifier"
    max_answer_tokens: int = Field(default=2048, ge=16)
    max_new_tokens: int = Field(default=256, ge=8)
    max_copied_tokens: int | None = Field(default=None, ge=1)


CheckpointConfig = Annotated[DetectorConfig | DetoxifierConfig, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[DetectorConfig | DetoxifierConfig] = TypeAdapter(CheckpointConfig)


def read_config(folder: Path) -> DetectorConfig | DetoxifierConfig:
    """The checked `guard.json` of a checkpoint folder.

    Raises:
        CheckpointError: The file is missing or does not fit the format.
    """
    path = folder / CONFIG_FILE
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {type(error).__name__}", source=folder) from error
    except ValidationError as error:
        fields = sorted({".".join(str(part) for part in e["loc"]) + f" ({e['type']})" for e in error.errors()})
        raise CheckpointError(
            f"{str(path)!r} does not fit the checkpoint format; wrong fields: {', '.join(fields)}. "
            "Mend them, or train again with this version.",
            source=folder,
        ) from error


def write_config(folder: Path, config: DetectorConfig | DetoxifierConfig) -> None:
    """Writes `guard.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def require_safetensors(folder: Path, pattern: str, *, source: str) -> None:
    """Passes if a file that fits `pattern` is there.

    Raises:
        CheckpointError: There is none; the message tells pickle files from nothing at all.
    """
    if any(folder.glob(pattern)):
        return
    pickles = sorted(path.name for unsafe in _PICKLE_PATTERNS for path in folder.glob(unsafe))
    if pickles:
        raise CheckpointError(
            f"{source!r} has its weights only as pickle files ({', '.join(pickles)}), which can run code when read. "
            f"Convert them once, somewhere safe: load each with torch.load(file, weights_only=True) and write it with "
            f"safetensors.torch.save_file(weights, {pattern.replace('*', '')!r}) beside it.",
            source=source,
        )
    raise CheckpointError(
        f"{source!r} has no file {pattern!r}. Check the path, or copy the whole checkpoint folder again.", source=source
    )
