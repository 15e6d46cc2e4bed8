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
from mllm_protector_guard.models.backbone import load_tokenizer, resolve_base
from mllm_protector_guard.models.checkpoint import HEAD_FILE, DetectorConfig
from mllm_protector_guard.models.detector import PooledClassifier, TransformersDetector, load_pooled, pad
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.models.prompts import DETECTOR_TEMPLATES, encode, shorten, template
from mllm_protector_guard.training.calibrate import choose_threshold, fit_temperature
from mllm_protector_guard.training.config import DetectorRecipe
from mllm_protector_guard.training.rows import AnswerRow, choose, read_training_rows
from mllm_protector_guard.training.trainer import add_lora, finish, fit, is_done, load_whole, save_adapter
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
        resume: Go on with an unfinished run; a finished one stays as it is.
        local_files_only: Fetch no base model.

    Returns:
        The folder, in the format that `load_detector` reads.

    Raises:
        DataError: A row does not fit.
        ConfigError: The recipe contradicts the base model or the rows, or the folder is taken.
        CheckpointError: The base model cannot be loaded.
    """
    folder = Path(output)
    if is_done(folder, resume=resume):
        return folder
    set_seed(recipe.seed)
    rows = choose(read_training_rows(train, AnswerRow), recipe.sources, recipe.other_sources, recipe.seed)
    dev_rows = _calibration_rows(read_training_rows(dev, AnswerRow), recipe)
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
    backbone = load_whole(AutoModel, base, **options)
    adapted = add_lora(backbone, recipe, recipe.base.name)
    classifier = PooledClassifier(adapted, hidden_size=backbone.config.hidden_size, pooling=recipe.pooling)
    encoded = _encode(rows, recipe, tokenizer)
    model = _WithLoss(classifier, recipe.label_smoothing).train()
    fit(model, encoded, lambda batch: _collate(batch, tokenizer.pad_token_id), recipe, folder, resume=resume)
    save_adapter(adapted, folder)
    save_file(
        {name: w.detach().cpu().contiguous() for name, w in classifier.head.state_dict().items()}, folder / HEAD_FILE
    )
    finish(folder, _calibrate(folder, config, recipe, dev_rows, local_files_only))
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


def _encode(rows: Sequence[tuple[AnswerRow, float]], recipe: DetectorRecipe, tokenizer: Any) -> list[dict[str, Any]]:
    pattern = template(recipe.template, DETECTOR_TEMPLATES)
    rng = random.Random(recipe.seed)  # noqa: S311
    encoded: list[dict[str, Any]] = []
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


def _calibration_rows(dev_rows: Sequence[AnswerRow], recipe: DetectorRecipe) -> list[AnswerRow]:
    """The rows that set temperature and threshold, those whose F1 counts first; refused early if they cannot."""
    shuffled = random.Random(recipe.seed).sample(list(dev_rows), len(dev_rows))  # noqa: S311
    rows = sorted(shuffled, key=lambda row: not _counts(row, recipe))[: recipe.calibration_rows]
    if not any(row.harmful and _counts(row, recipe) for row in rows):
        raise ConfigError(
            f"the threshold cannot be chosen: no harmful row of {list(recipe.metric_sources) or 'any source'} among "
            f"{len(rows)} calibration rows; give other dev files or change metric_sources"
        )
    return rows


def _counts(row: AnswerRow, recipe: DetectorRecipe) -> bool:
    return not recipe.metric_sources or row.source in recipe.metric_sources


def _calibrate(
    folder: Path,
    config: DetectorConfig,
    recipe: DetectorRecipe,
    rows: Sequence[AnswerRow],
    local_files_only: bool | None,
) -> DetectorConfig:
    """The config with temperature and threshold from the rows, scored as in use."""
    detector = TransformersDetector(
        config, lambda: load_pooled(folder, config, Placement(), local_files_only=local_files_only)
    )
    scores = np.array(detector.score([Turn(question=row.question, answer=row.answer) for row in rows]))
    harmful = np.array([bool(row.harmful) for row in rows])
    clipped = np.clip(scores, 1e-7, 1.0 - 1e-7)
    logits = np.log(clipped / (1.0 - clipped))
    temperature = fit_temperature(logits, harmful)
    calibrated = 1.0 / (1.0 + np.exp(-logits / temperature))
    with_harm = {row.source for row in rows if row.harmful}
    benign = np.array([row.source not in with_harm for row in rows])
    counted = np.array([_counts(row, recipe) for row in rows]) & ~benign
    threshold = choose_threshold(calibrated[counted], harmful[counted], calibrated[benign], recipe.max_fpr)
    logger.info("temperature %.3f, threshold %.4f, from %d rows", temperature, threshold, len(rows))
    return config.model_copy(update={"temperature": temperature, "threshold": threshold})
