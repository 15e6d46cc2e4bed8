"""Harm detectors on transformers models: ours (pooled backbone with a one-unit head) and any sequence classifier."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mllm_protector_guard.errors import DetectorError
from mllm_protector_guard.models.checkpoint import (
    DetectorConfig,
)
from mllm_protector_guard.models.detector_loading import LoadedDetector, probabilities
from mllm_protector_guard.models.prompts import DETECTOR_TEMPLATES, encode, encode_all, template
from mllm_protector_guard.models.stream_scorer import IncrementalStream
from mllm_protector_guard.models.windows import Window, windows
from mllm_protector_guard.ports import StreamScorer
from mllm_protector_guard.rescoring import RescoringStream
from mllm_protector_guard.types import ImageInput, Turn

__all__ = ["TransformersDetector", "pad", "tensors"]


class TransformersDetector:
    """Implements the `HarmDetector` port; loads its model at the first score, once.

    An answer longer than `window_tokens` is scored in overlapping windows, and its worst window counts.
    An answer with no legible character (only zero-width characters, say) scores 0.

    Args:
        config: How turns become tokens and logits become scores.
        load: Loads the model.
        batch_tokens: Upper bound on rows times tokens of a forward pass; None takes 4,096 on a CPU and
            32,768 elsewhere.
    """

    def __init__(
        self, config: DetectorConfig, load: Callable[[], LoadedDetector], *, batch_tokens: int | None = None
    ) -> None:
        self.config = config
        self.threshold = config.threshold
        self._template = template(config.template, DETECTOR_TEMPLATES)
        self._load = load
        self._loaded: LoadedDetector | None = None
        self._lock = threading.Lock()
        self._batch_tokens = batch_tokens

    def warm_up(self) -> None:
        """Loads the model, if it is not loaded yet.

        Raises:
            CheckpointError: It cannot be loaded.
        """
        self._ready()

    def score(self, turns: Sequence[Turn]) -> list[float]:
        """P(harmful) of each answer given its question, in [0, 1], same order.

        Raises:
            DetectorError: A score is not a finite number.
            CheckpointError: The model cannot be loaded.
        """
        loaded = self._ready()
        encoded = encode_all(turns, self._template, loaded.tokenizer)
        found = [
            (index, window)
            for index, one in enumerate(encoded)
            for window in windows(one, self.config, loaded.max_tokens)
        ]
        scores = [0.0] * len(turns)
        on_cpu = loaded.device.type == "cpu"
        budget = self._batch_tokens or (4096 if on_cpu else 32768)
        # A CPU works on padding as long as on text: eight answers of 120 to 1,000 characters took 1.7 times as long
        # in one batch as one by one, and 0.9 times in batches of like length. A GPU pays for every pass.
        batches = list(_batches(found, budget, length_ratio=1.25 if on_cpu else math.inf))
        passes = [_forward(loaded, [window for _, window in batch]) for batch in batches]
        # Read only now: to read the scores of a pass is to wait for it, and a GPU would then wait for the next.
        for batch, harm_scores in zip(batches, passes, strict=True):
            for (index, _), score in zip(batch, _checked(harm_scores), strict=True):
                scores[index] = max(scores[index], score)
        return scores

    def open_stream(self, question: str | None, images: Sequence[ImageInput] = ()) -> StreamScorer:
        """A scorer of one growing answer, whose last score is that of `score` on the whole.

        Our causal detectors read each token once; all others score the answer so far at every feed.

        Raises:
            CheckpointError: The model cannot be loaded.
        """
        loaded = self._ready()
        if loaded.pooled is None:
            return RescoringStream(self, question, images)
        return IncrementalStream(
            loaded.pooled,
            windows=lambda answer, told: list(self._windows(loaded, Turn(question=question, answer=answer), told=told)),
            harm_scores=lambda logits: _checked(probabilities(logits, self.config)),
        )

    def _ready(self) -> LoadedDetector:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _windows(self, loaded: LoadedDetector, turn: Turn, *, told: bool = False) -> Iterator[Window]:
        encoded = encode(turn, self._template, loaded.tokenizer)
        return windows(encoded, self.config, loaded.max_tokens, told=told)


def _batches(
    found: list[tuple[int, Window]], budget: int, *, length_ratio: float
) -> Iterator[list[tuple[int, Window]]]:
    """Windows of like length together, padded size within the budget; each with the index of its turn.

    The longest of a batch is at most `length_ratio` times as long as the shortest.
    """
    batch: list[tuple[int, Window]] = []
    for index, window in sorted(found, key=lambda item: len(item[1].ids)):
        length = len(window.ids)
        if batch and ((len(batch) + 1) * length > budget or length > length_ratio * len(batch[0][1].ids)):
            yield batch
            batch = []
        batch.append((index, window))
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """int64 [rows, longest], right-padded with `value`."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


@torch.inference_mode()
def _forward(loaded: LoadedDetector, batch: list[Window]) -> Tensor:
    return loaded.harm_scores(*tensors(batch, loaded.tokenizer.pad_token_id, loaded.device))


def tensors(batch: Sequence[Window], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and answer_mask of `PooledClassifier.forward` for these windows."""
    input_ids = pad([window.ids for window in batch], pad_id).to(device)
    bounds = torch.tensor([(len(w.ids), w.answer.start, w.answer.stop) for w in batch], device=device)
    length, start, stop = bounds.T.unsqueeze(-1)
    at = torch.arange(input_ids.shape[1], device=device)
    return input_ids, (at < length).long(), ((start <= at) & (at < stop)).long()


def _checked(scores: Tensor) -> list[float]:
    values: list[float] = scores.double().tolist()
    if not all(0.0 <= value <= 1.0 for value in values):
        raise DetectorError("the detector's score is not a finite number; load it with dtype='float32'")
    return values
