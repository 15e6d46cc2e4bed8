"""Trains a harm detector: binary cross-entropy on a linear unit over a pooled backbone (paper, section 3.1)."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, set_seed

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models.backbone import load_tokenizer, resolve_base
from mllm_protector_guard.models.checkpoint import HEAD_FILE, DetectorConfig
from mllm_protector_guard.models.detector import TransformersDetector
from mllm_protector_guard.models.detector_loading import load_pooled
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.models.pooling import PooledClassifier
from mllm_protector_guard.training.adapters import (
    add_lora,
    load_adapter_weights,
    load_whole,
    save_adapter,
    starting_point,
)
from mllm_protector_guard.training.batches import collate, encode_rows
from mllm_protector_guard.training.calibrate import choose_threshold, fit_temperature, to_log_odds, to_scores
from mllm_protector_guard.training.config import DetectorRecipe
from mllm_protector_guard.training.labels import join_labels
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow, choose, licensed, read_training_rows
from mllm_protector_guard.training.trainer import finish, fit, is_done, is_main_process, wait_for_all
from mllm_protector_guard.training.weights import below, trained_weights
from mllm_protector_guard.types import Turn

__all__ = ["train_detector"]

logger = logging.getLogger(__name__)


def train_detector(
    recipe: DetectorRecipe,
    *,
    train: Sequence[str | Path],
    dev: Sequence[str | Path],
    pairs: Sequence[str | Path] = (),
    labels: Sequence[str | Path] = (),
    dev_labels: Sequence[str | Path] = (),
    output: str | Path,
    resume: bool = False,
    local_files_only: bool | None = None,
) -> Path:
    """Trains, calibrates on the dev files, and writes a checkpoint folder.

    Args:
        recipe: What to train and how.
        train: Files of `{"question", "answer", "harmful", "source"}` rows.
        dev: The same, for temperature and threshold; never trained on.
        pairs: Files of `{"question", "rejected", "accepted"}` rows, whose answers `labels` and `dev_labels` are for.
        labels: Files of `{"sha256", "harmful"}`, labels of answers in `pairs` (see `labels.py`).
        dev_labels: The same, for temperature and threshold.
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
    both = read_training_rows(pairs, RewriteRow)
    known = read_training_rows(train, AnswerRow) + join_labels(labels, both)
    rows = choose(licensed(known, recipe.licences), recipe.sources, recipe.other_sources, recipe.seed)
    known = read_training_rows(dev, AnswerRow) + join_labels(dev_labels, both)
    dev_rows = calibration_rows(licensed(known, recipe.licences), recipe)
    base = resolve_base(recipe.base, local_files_only=local_files_only)
    tokenizer = load_tokenizer(base, padding_side="right")
    config = _checkpoint_config(recipe)
    classifier = _classifier(recipe, base)
    model = _WithLoss(classifier, label_smoothing=recipe.label_smoothing, pair_weight=recipe.pair_weight).train()
    items = encode_rows(rows, recipe, tokenizer)
    start = {name: weight.clone() for name, weight in trained_weights(model).items()} if recipe.start_share else {}
    trained = fit(model, items, lambda batch: collate(batch, tokenizer.pad_token_id), recipe, folder, resume=resume)
    if is_main_process():
        for name, weight in start.items():
            trained[name] = trained[name].lerp(weight.to(trained[name].dtype), recipe.start_share)
        save_adapter(classifier.backbone, below(trained, "classifier.backbone."), folder)
        save_file(below(trained, "classifier.head."), folder / HEAD_FILE)
        finish(folder, calibrated(folder, config, recipe, dev_rows, local_files_only))
    wait_for_all()
    return folder


def _checkpoint_config(recipe: DetectorRecipe) -> DetectorConfig:
    return DetectorConfig(
        base=recipe.base,
        template=recipe.template,
        layers=recipe.layers,
        pooling=recipe.pooling,
        peak_tokens=recipe.peak_tokens,
        window_tokens=recipe.window_tokens,
        overlap_tokens=recipe.overlap_tokens,
        revision=recipe.revision,
        licence=recipe.licence,
    )


def _classifier(recipe: DetectorRecipe, base: Path) -> PooledClassifier:
    """The model to train, with a fresh adapter and head or those of `start_from`."""
    options = {} if recipe.layers is None else {"num_hidden_layers": recipe.layers}
    backbone = load_whole(AutoModel, base, bf16=recipe.bf16, **options)
    adapted = add_lora(backbone, recipe, recipe.base.name)
    classifier = PooledClassifier(
        adapted, hidden_size=backbone.config.hidden_size, pooling=recipe.pooling, peak_tokens=recipe.peak_tokens
    )
    if recipe.start_from is not None:
        _start_from(classifier, recipe)
    return classifier


def _start_from(classifier: PooledClassifier, recipe: DetectorRecipe) -> None:
    folder, config = starting_point(recipe)
    if not (isinstance(config, DetectorConfig) and config.polarity == "harmful" and config.layers == recipe.layers):
        raise ConfigError(f"start_from {recipe.start_from!r} has other layers or another polarity than this recipe")
    load_adapter_weights(classifier.backbone, folder)
    classifier.head.load_state_dict(load_file(folder / HEAD_FILE))


class _WithLoss(nn.Module):
    """Weighted binary cross-entropy on the classifier's logits, and a ranking term over pairs.

    L = sum(w * BCE) / sum(w) - pair_weight * sum(log sigmoid(z_harmful - z_harmless)) / pairs, over a whole step.
    The official code has 2 * (BCE_safer + BCE_other) - log sigmoid(r_safer - r_other) for each pair, r being the logit
    of harmless. On pairs alone, of weight 1, that is 4 * L with a pair_weight of 0.25.
    """

    accepts_loss_kwargs = True

    def __init__(self, classifier: PooledClassifier, *, label_smoothing: float = 0.0, pair_weight: float = 0.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.label_smoothing = label_smoothing
        self.pair_weight = pair_weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_mask: Tensor,
        labels: Tensor,
        weights: Tensor,
        totals: Tensor,
        pairs: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> dict[str, Tensor]:
        weight, pair_count = totals if num_items_in_batch is None else num_items_in_batch
        logits = self.classifier(input_ids, attention_mask, answer_mask)
        # Sharding over devices rounds what comes in to bfloat16.
        targets = labels.float() * (1.0 - 2.0 * self.label_smoothing) + self.label_smoothing
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weight
        if pairs is not None:
            margins = logits[pairs[:, 0]] - logits[pairs[:, 1]]
            loss = loss - self.pair_weight * nn.functional.logsigmoid(margins).sum() / pair_count
        return {"loss": loss, "logits": logits}


def calibration_rows(dev_rows: Sequence[AnswerRow], recipe: DetectorRecipe) -> list[AnswerRow]:
    """The rows that set temperature and threshold, those of the named sources first; refused early if they cannot."""
    shuffled = random.Random(recipe.seed).sample(list(dev_rows), len(dev_rows))  # noqa: S311
    named = {*recipe.metric_sources, *recipe.fpr_sources}
    rows = sorted(shuffled, key=lambda row: row.source not in named)[: recipe.calibration_rows]
    if not any(row.harmful and _counts(row, recipe.metric_sources) for row in rows):
        raise ConfigError(
            f"the threshold cannot be chosen: no harmful row of {list(recipe.metric_sources) or 'any source'} among "
            f"{len(rows)} calibration rows; give other dev files or change metric_sources"
        )
    return rows


def _counts(row: AnswerRow, sources: Sequence[str]) -> bool:
    return not sources or row.source in sources


def calibrated(
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
    log_odds = to_log_odds(scores)
    temperature = fit_temperature(log_odds, harmful)
    calibrated = to_scores(log_odds / temperature)
    with_harm = {row.source for row in rows if row.harmful}
    harmless_only = np.array([row.source not in with_harm for row in rows])
    counted = ~harmless_only & np.array([_counts(row, recipe.metric_sources) for row in rows])
    benign = harmless_only & np.array([_counts(row, recipe.fpr_sources) for row in rows])
    threshold = choose_threshold(calibrated[counted], harmful[counted], calibrated[benign], recipe.max_fpr)
    logger.info("temperature %.3f, threshold %.4f, from %d rows", temperature, threshold, len(rows))
    return config.model_copy(update={"temperature": temperature, "threshold": threshold})
