"""Harm detectors on transformers models: ours (pooled backbone with a one-unit head) and any sequence classifier."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from mllm_protector_guard.errors import CheckpointError, ConfigError, DetectorError
from mllm_protector_guard.models.backbone import (
    isolated,
    load_model,
    load_tokenizer,
    max_tokens,
    require_pad_token,
    resolve_base,
    tokenizer_home,
    with_adapter,
)
from mllm_protector_guard.models.checkpoint import (
    ADAPTER_FILE,
    HEAD_FILE,
    BaseReference,
    DetectorConfig,
    require_safetensors,
)
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.models.pooling import PooledClassifier
from mllm_protector_guard.models.prompts import DETECTOR_TEMPLATES, encode, encode_all, template
from mllm_protector_guard.models.stream_scorer import IncrementalStream, can_stream
from mllm_protector_guard.models.windows import Window, windows
from mllm_protector_guard.ports import StreamScorer
from mllm_protector_guard.rescoring import RescoringStream
from mllm_protector_guard.types import ImageInput, Turn

__all__ = ["LoadedDetector", "TransformersDetector", "load_classifier", "load_pooled", "pad", "tensors"]

_ADAPTER_HEADS = ("score", "classifier")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDetector:
    """A detector in memory.

    Attributes:
        max_tokens: Most tokens that it can read at once.
        harm_scores: From input_ids, attention_mask and answer_mask (see `PooledClassifier.forward`) to
            P(harmful), float [batch].
        pooled: The model under `harm_scores`, if it can score a growing answer without reading it anew.
    """

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    max_tokens: int
    harm_scores: Callable[[Tensor, Tensor, Tensor], Tensor]
    pooled: PooledClassifier | None = None


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
            harm_scores=lambda logits: _checked(_harm_scores(logits, self.config)),
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


def _harm_scores(logits: Tensor, config: DetectorConfig) -> Tensor:
    sign = 1.0 if config.polarity == "harmful" else -1.0
    return torch.sigmoid(sign * logits / config.temperature)


def load_pooled(
    folder: Path, config: DetectorConfig, placement: Placement, *, local_files_only: bool | None
) -> LoadedDetector:
    """A detector in our format.

    Raises:
        CheckpointError: A part is missing, damaged, or does not fit the others.
    """
    require_safetensors(folder, HEAD_FILE, source=str(folder))
    base = resolve_base(config.base, local_files_only=local_files_only)
    tokenizer = load_tokenizer(base, padding_side="right")
    backbone, missing = load_model(AutoModel, base, placement, **_layers(config.layers))
    if missing:
        raise CheckpointError(
            f"the base model {config.base.name!r} lacks {len(missing)} weights of {config.layers or 'all its'} layers. "
            "Point `base` in guard.json to the right model, or pull it again.",
            source=folder,
        )
    if (folder / ADAPTER_FILE).exists() or (folder / "adapter_config.json").exists():
        backbone = with_adapter(backbone, folder, merge=placement.quantization is None)
    device = next(backbone.parameters()).device
    try:
        with isolated():
            model = PooledClassifier(
                backbone,
                hidden_size=backbone.config.hidden_size,
                pooling=config.pooling,
                peak_tokens=config.peak_tokens,
            )
            model.head.load_state_dict(load_file(folder / HEAD_FILE))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{HEAD_FILE} in {str(folder)!r} is damaged or no one-unit head on {backbone.config.hidden_size} features. "
            "Copy the checkpoint folder again, or check `base` and `layers` in guard.json.",
            source=folder,
        ) from error
    model.head.to(device)

    def harm_scores(input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
        return _harm_scores(model(input_ids, attention_mask, answer_mask), config)

    return LoadedDetector(
        tokenizer=tokenizer,
        device=device,
        max_tokens=max_tokens(backbone),
        harm_scores=harm_scores,
        pooled=model if can_stream(backbone) else None,
    )


def _layers(layers: int | None) -> dict[str, int]:
    return {} if layers is None else {"num_hidden_layers": layers}


def load_classifier(
    folder: Path,
    config: DetectorConfig,
    placement: Placement,
    *,
    label: str | None,
    base: BaseReference | None,
    local_files_only: bool | None,
) -> LoadedDetector:
    """A sequence classifier of transformers: a whole checkpoint, or a LoRA adapter with its head on `base`.

    Args:
        folder: The checkpoint.
        config: Template, polarity and windows.
        placement: Device, dtype, quantization.
        label: Which label to read; may be None if there is only one.
        base: The model under an adapter.
        local_files_only: Fetch nothing.

    Raises:
        CheckpointError: The head was not in the checkpoint, or parts do not fit.
        ConfigError: The model has several labels and none is named.
    """
    root = folder if base is None else resolve_base(base, local_files_only=local_files_only)
    tokenizer = load_tokenizer(root if base is None else tokenizer_home(folder, root), padding_side="right")
    options = {} if base is None else {"num_labels": 1}
    model, missing = load_model(AutoModelForSequenceClassification, root, placement, **options)
    if base is not None:
        _require_head_in_adapter(folder)
        model = with_adapter(model, folder, merge=placement.quantization is None)
        missing = {name for name in missing if name.split(".")[0] not in _ADAPTER_HEADS}
    if missing:
        raise CheckpointError(
            f"{str(root)!r} lacks the weights {sorted(missing)}; a fresh head would score at random. "
            "Give a checkpoint that was trained as a sequence classifier.",
            source=folder,
        )
    require_pad_token(tokenizer, model)
    model.config.pad_token_id = tokenizer.pad_token_id
    index = _label_index(model, label)

    def harm_scores(input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        one_of_many = logits.shape[-1] > 1 and model.config.problem_type != "multi_label_classification"
        scores = (logits.softmax(-1) if one_of_many else torch.sigmoid(logits / config.temperature))[:, index]
        return scores if config.polarity == "harmful" else 1.0 - scores

    return LoadedDetector(
        tokenizer=tokenizer, device=model.device, max_tokens=max_tokens(model), harm_scores=harm_scores
    )


def _require_head_in_adapter(folder: Path) -> None:
    require_safetensors(folder, ADAPTER_FILE, source=str(folder))
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            names: list[str] = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{ADAPTER_FILE} in {str(folder)!r} is damaged. Copy the checkpoint folder again.", source=folder
        ) from error
    if not any(part in _ADAPTER_HEADS for name in names for part in name.split(".")):
        raise CheckpointError(
            f"the adapter in {str(folder)!r} has no classification head; a fresh head would score at random. "
            "Save it with modules_to_save=['score'].",
            source=folder,
        )


def _label_index(model: PreTrainedModel, label: str | None) -> int:
    labels: dict[str, Any] = {str(name): int(index) for index, name in (model.config.id2label or {}).items()}
    if label is None and len(labels) == 1:
        return 0
    if label not in labels:
        raise ConfigError(f"name the label to read with label=; this model has {sorted(labels)}, got {label!r}")
    return int(labels[label])
