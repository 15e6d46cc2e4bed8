"""Small bases, recipes and rows for training runs of seconds, in which a keyword decides harm."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm_protector_guard import Turn
from mllm_protector_guard.models.checkpoint import BaseReference
from mllm_protector_guard.training import DetectorRecipe, DetoxifierRecipe
from mllm_protector_guard.training.config import LoraRecipe

HARMFUL_WORD = "knife"
REWRITES = [
    {"question": f"What is {i}?", "rejected": f"You are {word}.", "accepted": f"Bake {word} bread."}
    for i, word in enumerate(["mild", "salt", "cat", "flour", "yeast", "water", "garden", "weather"])
]
_WORDS = ["bread", "garden", "picture", "weather", "cat", "water", "salt", "mild"]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer_rows(count: int, seed: int, *, source: str = "chat", harmful: bool | None = None) -> list[dict[str, Any]]:
    drawn = random.Random(seed)
    rows = []
    for index in range(count):
        bad = index % 2 == 0 if harmful is None else harmful
        words = drawn.choices(_WORDS, k=drawn.randint(3, 8))
        if bad:
            words = [HARMFUL_WORD, *words, HARMFUL_WORD]
        rows.append({"question": "What now?", "answer": " ".join(words), "harmful": bad, "source": source})
    return rows


def detector_recipe(base: Path, **fields: Any) -> DetectorRecipe:
    given = {
        "layers": 2,
        "learning_rate": 1e-2,
        "batch_size": 8,
        "epochs": 6,
        "bf16": False,
        "question_dropout": 0.0,
        "crop_share": 0.0,
        "max_fpr": 0.1,
    }
    return DetectorRecipe(**{**_common(base), **given, **fields})


def detoxifier_recipe(base: Path, **fields: Any) -> DetoxifierRecipe:
    given = {"learning_rate": 2e-2, "batch_size": 2, "epochs": 50, "bf16": False, "question_dropout": 0.0}
    return DetoxifierRecipe(**{**_common(base), **given, **fields})


def _common(base: Path) -> dict[str, Any]:
    return {
        "base": BaseReference(name=str(base)),
        "lora": LoraRecipe(rank=8, dropout=0.0),
        "revision": "0",
        "licence": "MIT",
        "seed": 3,
    }


def turns(rows, field="answer"):
    return [Turn(question=row["question"], answer=row[field]) for row in rows]
