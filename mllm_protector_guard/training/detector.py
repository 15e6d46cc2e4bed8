"""Trains a harm detector: binary cross-entropy on a linear unit over a pooled backbone (paper, section 3.1)."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, set_seed

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models import load_detector
from mllm_protector_guard.models.backbone import load_model, load_tokenizer, resolve_base
from mllm_protector_guard.models.checkpoint import CONFIG_FILE, HEAD_FILE, DetectorConfig, write_config
from mllm_protector_guard.models.detector import PooledClassifier, pad
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.models.prompts import DETECTOR_TEMPLATES, encode, shorten, template
from mllm_protector_guard.training.calibrate import choose_threshold, fit_temperature
from mllm_protector_guard.training.config import DetectorRecipe
from mllm_protector_guard.training.rows import AnswerRow, choose, read_training_rows
from mllm_protector_guard.training.trainer import add_lora, fit
from mllm_protector_guard.types import Turn

__all__ = ["train_detector"]

logger = logging.getLogger(__name__)

_SHORTEST_CROP = 24


def train_detector(
    recipe: DetectorRecipe,
    *,
    train: Sequence[str | Path],
    dev: Sequence[str | Path],
    output: str | Path,
    resume: bool = False,
    local_files_only: bool | None = None,
) -> Path:
    """Trains, calibrates on the dev files, and writes a checkpoint folder.

    Args:
        recipe: What to train and how.
        train: Files of `{"question", "answer", "harmful", "source"}` rows.
        dev: The same, for temperature and threshold; never trained on.
        output: The checkpoint folder; unfinished work is kept in `output/run`.
        resume: Go on with an unfinished run.
        local_files_only: Fetch no base model.

    Returns:
        The folder, in the format that `load_detector` reads.

    Raises:
        DataError: A row does not fit.
        ConfigError: The recipe contradicts the base model, or the folder is taken.
        CheckpointError: The base model cannot be loaded.
    """
    folder = Path(output)
    if (folder / CONFIG_FILE).exists() and not resume:
        raise ConfigError(f"{str(folder)!r} already holds a checkpoint; choose another output")
    set_seed(recipe.seed)
    rows = choose(read_training_rows(train, AnswerRow), recipe.sources, recipe.other_sources, recipe.seed)
    dev_rows = read_training_rows(dev, AnswerRow)
    base = resolve_base(recipe.base, local_files_only=local_files_only)
    tokenizer = load_tokenizer(base, padding_side="right")
    config = DetectorConfig(
        base=recipe.base,
        template=recipe.template,
        layers=recipe.layers,
        pooling=recipe.pooling,
        revision=recipe.revision,
        licence=recipe.licence,
    )
    options = {} if recipe.layers is None else {"num_hidden_layers": recipe.layers}
    backbone, _ = load_model(AutoModel, base, Placement(dtype="float32"), **options)
    adapted = add_lora(backbone, recipe, recipe.base.name)
    classifier = PooledClassifier(adapted, hidden_size=backbone.config.hidden_size, pooling=recipe.pooling)
    encoded = _encode(rows, recipe, tokenizer)
    model = _WithLoss(classifier, recipe.label_smoothing).train()
    fit(model, encoded, lambda batch: _collate(batch, tokenizer.pad_token_id), recipe, folder / "run", resume=resume)
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    save_file({name: w.detach().cpu().contiguous() for name, w in classifier.head.state_dict().items()}, folder / HEAD_FILE)
    write_config(folder, config)
    write_config(folder, _calibrate(folder, config, recipe, dev_rows))
    return folder


class _WithLoss(nn.Module):
    """Weighted binary cross-entropy on the classifier's logits."""

    def __init__(self, classifier: PooledClassifier, label_smoothing: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.label_smoothing = label_smoothing

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor, labels: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        logits = self.classifier(input_ids, attention_mask, answer_mask)
        targets = labels * (1.0 - 2.0 * self.label_smoothing) + self.label_smoothing
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return {"loss": (losses * weights).sum() / weights.sum(), "logits": logits}


def _encode(
    rows: Sequence[tuple[AnswerRow, float]], recipe: DetectorRecipe, tokenizer: Any
) -> list[dict[str, Any]]:
    pattern = template(recipe.template, DETECTOR_TEMPLATES)
    rng = random.Random(recipe.seed)  # noqa: S311
    encoded = []
    for row, weight in rows:
        question = None if rng.random() < recipe.question_dropout else row.question
        turn = encode(Turn(question=question, answer=row.answer), pattern, tokenizer)
        prefix, answer = shorten(turn.prefix, recipe.max_question_tokens), turn.answer[: recipe.max_answer_tokens]
        if rng.random() < recipe.crop_share and len(answer) > _SHORTEST_CROP:
            answer = answer[: rng.randint(_SHORTEST_CROP, len(answer))]
        if answer:
            ids = [*prefix, *answer, *turn.suffix]
            mask = [0] * len(prefix) + [1] * len(answer) + [0] * len(turn.suffix)
            encoded.append({"input_ids": ids, "answer_mask": mask, "label": float(bool(row.harmful)), "weight": weight})
    logger.info("%d rows, %d tokens", len(encoded), sum(len(row["input_ids"]) for row in encoded))
    return encoded


def _collate(batch: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    return {
        "input_ids": pad([row["input_ids"] for row in batch], pad_token_id),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in batch], 0),
        "answer_mask": pad([row["answer_mask"] for row in batch], 0),
        "labels": torch.tensor([row["label"] for row in batch]),
        "weights": torch.tensor([row["weight"] for row in batch]),
    }


def _calibrate(
    folder: Path, config: DetectorConfig, recipe: DetectorRecipe, dev_rows: Sequence[AnswerRow]
) -> DetectorConfig:
    """The config with temperature and threshold from the dev rows, scored as in use."""
    rng = random.Random(recipe.seed)  # noqa: S311
    rows = rng.sample(list(dev_rows), min(recipe.calibration_rows, len(dev_rows)))
    detector = load_detector(str(folder), device="auto")
    scores = np.array(detector.score([Turn(question=row.question, answer=row.answer) for row in rows]))
    harmful = np.array([bool(row.harmful) for row in rows])
    clipped = np.clip(scores, 1e-7, 1.0 - 1e-7)
    logits = np.log(clipped / (1.0 - clipped))
    temperature = fit_temperature(logits, harmful)
    calibrated = 1.0 / (1.0 + np.exp(-logits / temperature))
    with_harm = {row.source for row in rows if row.harmful}
    benign = np.array([row.source not in with_harm for row in rows])
    counted = np.array([not recipe.metric_sources or row.source in recipe.metric_sources for row in rows]) & ~benign
    threshold = choose_threshold(calibrated[counted], harmful[counted], calibrated[benign], recipe.max_fpr)
    logger.info("temperature %.3f, threshold %.4f, from %d rows", temperature, threshold, len(rows))
    return config.model_copy(update={"temperature": round(temperature, 4), "threshold": round(threshold, 4)})
