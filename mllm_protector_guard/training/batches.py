"""Detector rows as token ids, and batches of them."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_protector_guard.models.detector import pad
from mllm_protector_guard.models.prompts import DETECTOR_TEMPLATES, encode, shorten, template
from mllm_protector_guard.training.augment import bury, crop, disclaim
from mllm_protector_guard.training.config import DetectorRecipe
from mllm_protector_guard.training.rows import AnswerRow
from mllm_protector_guard.types import Turn

__all__ = ["collate", "encode_rows"]

logger = logging.getLogger(__name__)

_MOST_FILLERS = 2000

Item = dict[str, Any]


def encode_rows(
    rows: Sequence[tuple[AnswerRow, float]], recipe: DetectorRecipe, tokenizer: PreTrainedTokenizerBase
) -> list[Item]:
    """One item a row with `input_ids`, `answer_mask`, `label` and `weight`; blank answers are left out.

    With the recipe's `pair_weight`, a harmful and a harmless answer to one question are one item, whose two are in its
    `members`.

    Args:
        rows: With their weights in the loss.
        recipe: Says how rows are shortened, changed and paired.
        tokenizer: Of the base.
    """
    encoder = _Encoder(recipe, tokenizer)
    encoder.filler = _filler(rows, encoder)
    items = [(row, item) for row, weight in rows if (item := encoder.item(row, weight)) is not None]
    logger.info("%d rows, %d tokens", len(items), sum(len(item["input_ids"]) for _, item in items))
    return _paired(items) if recipe.pair_weight else [item for _, item in items]


class _Encoder:
    """Turns rows into items; its random draws come in the order of the rows."""

    def __init__(self, recipe: DetectorRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.filler: list[list[int]] = []
        self._pattern = template(recipe.template, DETECTOR_TEMPLATES)
        self._rng = random.Random(recipe.seed)  # noqa: S311
        self._separator: list[int] = tokenizer("\n\n", add_special_tokens=False)["input_ids"]

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, whole."""
        return encode(Turn(answer=text), self._pattern, self.tokenizer).answer

    def item(self, row: AnswerRow, weight: float) -> Item | None:
        """The row as an item; None if nothing of its answer is legible."""
        recipe, rng = self.recipe, self._rng
        question = None if rng.random() < recipe.question_dropout else row.question
        text = disclaim(row.answer, rng) if row.harmful and rng.random() < recipe.disclaimer_share else row.answer
        turn = encode(Turn(question=question, answer=text), self._pattern, self.tokenizer)
        answer = turn.answer[: recipe.max_answer_tokens]
        if not answer:
            return None
        if rng.random() < recipe.crop_share:
            answer = crop(answer, rng)
        if self.filler and rng.random() < recipe.bury_share:
            answer = bury(answer, self.filler, self._separator, recipe.buried_tokens, rng)
        prefix = shorten(turn.prefix, recipe.max_question_tokens)
        return {
            "input_ids": [*prefix, *answer, *turn.suffix],
            "answer_mask": [0] * len(prefix) + [1] * len(answer) + [0] * len(turn.suffix),
            "label": float(bool(row.harmful)),
            "weight": weight,
        }


def _filler(rows: Sequence[tuple[AnswerRow, float]], encoder: _Encoder) -> list[list[int]]:
    if not encoder.recipe.bury_share:
        return []
    harmless = [row for row, _ in rows if not row.harmful]
    drawn = random.Random(encoder.recipe.seed).sample(harmless, min(_MOST_FILLERS, len(harmless)))  # noqa: S311
    return [tokens for row in drawn if (tokens := encoder.answer(row.answer))]


def _paired(items: list[tuple[AnswerRow, Item]]) -> list[Item]:
    waiting: dict[tuple[str, str], dict[bool, list[Item]]] = defaultdict(lambda: {True: [], False: []})
    for row, item in items:
        if row.question:
            waiting[row.source, row.question][bool(row.harmful)].append(item)
    partner: dict[int, Item] = {}
    for group in waiting.values():
        for harmful, harmless in zip(group[True], group[False], strict=False):
            partner[id(harmful)], partner[id(harmless)] = harmless, harmful
    logger.info("%d pairs of a harmful and a harmless answer to one question", len(partner) // 2)
    paired = []
    for _, item in items:
        if id(item) not in partner:
            paired.append(item)
        elif item["label"]:
            members = [item, partner[id(item)]]
            paired.append({"input_ids": max((m["input_ids"] for m in members), key=len), "members": members})
    return paired


def collate(batch: list[Item], pad_token_id: int) -> dict[str, Tensor]:
    """The tensors of a batch, one row a member; `pairs` gives the rows of each (harmful, harmless) pair.

    `totals`, float [2], are the sum of the weights and the number of pairs.
    """
    rows: list[Item] = []
    pairs: list[tuple[int, int]] = []
    for item in batch:
        members = item.get("members")
        if members:
            pairs.append((len(rows), len(rows) + 1))
        rows += members or [item]
    weights = torch.tensor([row["weight"] for row in rows])
    tensors = {
        "input_ids": pad([row["input_ids"] for row in rows], pad_token_id),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "answer_mask": pad([row["answer_mask"] for row in rows], 0),
        "labels": torch.tensor([row["label"] for row in rows]),
        "weights": weights,
        "totals": torch.stack([weights.sum(), torch.tensor(float(len(pairs)))]),
    }
    return {**tensors, "pairs": torch.tensor(pairs)} if pairs else tensors
