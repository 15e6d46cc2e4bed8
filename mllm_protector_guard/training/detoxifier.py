"""Trains a response detoxifier: the autoregressive loss on the accepted answer alone (paper, section 3.2)."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, set_seed

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models.backbone import load_tokenizer, resolve_base
from mllm_protector_guard.models.checkpoint import DetoxifierConfig
from mllm_protector_guard.models.detector import pad
from mllm_protector_guard.models.legible import legible
from mllm_protector_guard.models.prompts import DETOXIFIER_TEMPLATES, encode, shorten, special_tokens, template
from mllm_protector_guard.training.adapters import (
    add_lora,
    load_adapter_weights,
    load_whole,
    save_adapter,
    starting_point,
)
from mllm_protector_guard.training.config import DetoxifierRecipe
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow, choose, licensed, read_training_rows
from mllm_protector_guard.training.targets import join_targets
from mllm_protector_guard.training.trainer import finish, fit, is_done, is_main_process, wait_for_all
from mllm_protector_guard.training.weights import below
from mllm_protector_guard.types import Turn

__all__ = ["train_detoxifier"]

logger = logging.getLogger(__name__)

_IGNORED = -100
_IDENTITY = "identity"


def train_detoxifier(
    recipe: DetoxifierRecipe,
    *,
    train: Sequence[str | Path],
    targets: Sequence[str | Path] = (),
    answers: Sequence[str | Path] = (),
    output: str | Path,
    resume: bool = False,
    local_files_only: bool | None = None,
) -> Path:
    """Trains and writes a checkpoint folder.

    Args:
        recipe: What to train and how.
        train: Files of `{"question", "rejected", "accepted", "source"}` rows.
        targets: Files of `{"sha256", "accepted"}`, rewrites of harmful answers in `train` or `answers`
            (see `targets.py`).
        answers: Files of `{"question", "answer", "harmful"}` rows: harmful ones for `targets`, harmless ones for the
            recipe's `identity_rows`.
        output: The checkpoint folder; unfinished work is kept in `output/run`.
        resume: Go on with an unfinished run; a finished one stays as it is.
        local_files_only: Fetch no base model.

    Returns:
        The folder, in the format that `load_detoxifier` reads.

    Raises:
        DataError: A row does not fit.
        ConfigError: The recipe contradicts the base model or the files, or the folder is taken.
        CheckpointError: The base model cannot be loaded.
    """
    folder = Path(output)
    if is_done(folder, resume=resume):
        return folder
    if recipe.identity_rows and not answers:
        raise ConfigError("the recipe asks for identity_rows; give files of harmless answers")
    set_seed(recipe.seed)
    triples = read_training_rows(train, RewriteRow)
    judged = read_training_rows(answers, AnswerRow)
    triples += join_targets(targets, triples, judged)
    rows = choose(licensed(triples, recipe.licences), recipe.sources, recipe.other_sources, recipe.seed)
    if recipe.identity_rows:
        rows += _identity_rows(licensed(judged, recipe.licences), recipe)
    base = resolve_base(recipe.base, local_files_only=local_files_only)
    tokenizer = load_tokenizer(base, padding_side="right")
    config = DetoxifierConfig(
        base=recipe.base,
        template=recipe.template,
        max_copied_tokens=recipe.max_copied_tokens,
        revision=recipe.revision,
        licence=recipe.licence,
    )
    adapted = add_lora(load_whole(AutoModelForCausalLM, base, bf16=recipe.bf16), recipe, recipe.base.name)
    if recipe.start_from is not None:
        load_adapter_weights(adapted, starting_point(recipe)[0])
    encoded = _encode(rows, recipe, tokenizer)
    model = _TargetLoss(adapted).train()
    trained = fit(model, encoded, lambda batch: _collate(batch, tokenizer.pad_token_id), recipe, folder, resume=resume)
    if is_main_process():
        save_adapter(adapted, below(trained, "causal_lm."), folder)
        finish(folder, config)
    wait_for_all()
    return folder


class _TargetLoss(nn.Module):
    """Cross-entropy on the rewrite's tokens, with logits at their positions only.

    A row's tokens weigh by the row's weight. Prompt tokens have the label -100 and cost no logits, which
    for a vocabulary of 49,152 are most of the memory.
    """

    accepts_loss_kwargs = True

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        weights: Tensor,
        totals: Tensor,
        num_items_in_batch: Tensor | None = None,
    ) -> dict[str, Tensor]:
        (weight,) = totals if num_items_in_batch is None else num_items_in_batch
        inner = self.causal_lm.get_base_model()
        hidden = inner.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        rows, positions = (labels[:, 1:] != _IGNORED).nonzero(as_tuple=True)
        logits = inner.lm_head(hidden[rows, positions]).float()
        losses = nn.functional.cross_entropy(logits, labels[rows, positions + 1], reduction="none")
        return {"loss": (losses * weights[rows]).sum() / weight}


def _identity_rows(rows: Sequence[AnswerRow], recipe: DetoxifierRecipe) -> list[tuple[RewriteRow, float]]:
    harmless = [row for row in rows if not row.harmful and row.answer.strip()]
    drawn = random.Random(recipe.seed).sample(harmless, min(recipe.identity_rows, len(harmless)))  # noqa: S311
    return [
        (RewriteRow(question=row.question, rejected=row.answer, accepted=row.answer, source=_IDENTITY), 1.0)
        for row in drawn
    ]


def _encode(rows: Sequence[tuple[RewriteRow, float]], recipe: DetoxifierRecipe, tokenizer: Any) -> list[dict[str, Any]]:
    pattern = template(recipe.template, DETOXIFIER_TEMPLATES)
    rng = random.Random(recipe.seed)  # noqa: S311
    special = special_tokens(tokenizer)
    encoded: list[dict[str, Any]] = []
    for row, weight in rows:
        accepted = legible(row.accepted.strip(), special)
        target = tokenizer(accepted + (pattern.end_of_turn or tokenizer.eos_token), add_special_tokens=False)[
            "input_ids"
        ]
        question = None if rng.random() < recipe.question_dropout else row.question
        turn = encode(Turn(question=question, answer=row.rejected), pattern, tokenizer)
        copied_in_part = row.source == _IDENTITY and len(turn.answer) > recipe.max_answer_tokens
        if not accepted or not turn.answer or len(target) > recipe.max_rewrite_tokens or copied_in_part:
            continue
        prefix, answer = shorten(turn.prefix, recipe.max_question_tokens), turn.answer[: recipe.max_answer_tokens]
        prompt = [*prefix, *answer, *turn.suffix]
        labels = [_IGNORED] * len(prompt) + target
        encoded.append({"input_ids": [*prompt, *target], "labels": labels, "weight": weight})
    tokens = sum(len(row["labels"]) for row in encoded)
    logger.info("%d rows, %d tokens; %d rows too long or blank", len(encoded), tokens, len(rows) - len(encoded))
    return encoded


def _collate(batch: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    labels = pad([row["labels"] for row in batch], _IGNORED)
    weights = torch.tensor([row["weight"] for row in batch])
    return {
        "input_ids": pad([row["input_ids"] for row in batch], pad_token_id),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in batch], 0),
        "labels": labels,
        "weights": weights,
        # The weights of all tokens with a label; the first one of a row is never one.
        "totals": ((labels != _IGNORED).sum(dim=1) * weights).sum().unsqueeze(0),
    }
