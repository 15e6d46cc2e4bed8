"""Scores an answer while it grows; the backbone reads each token once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mllm_protector_guard.errors import DetectorError
from mllm_protector_guard.models.pooling import PooledClassifier
from mllm_protector_guard.models.windows import Window

__all__ = ["IncrementalStream", "can_stream"]


def can_stream(backbone: PreTrainedModel) -> bool:
    """Whether a key-value cache can stand for the tokens that the backbone has read, and can be cut back.

    So it is if no attention looks ahead and no layer keeps a running state. A backbone that does not say cannot.
    """
    causal = [bool(module.is_causal) for module in backbone.modules() if hasattr(module, "is_causal")]
    if not causal or not all(causal):
        return False
    kinds = {type(layer) for layer in DynamicCache(config=backbone.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


class IncrementalStream:
    """Implements the `StreamScorer` port on a causal backbone.

    The whole answer so far becomes tokens at every feed, because more text can change the last tokens, and the
    legible view of what came before. Tokens that stayed the same from the start of a window are not read again.
    One cache is held, that of the last window; from windows that are full only the logit is kept.

    One thread at a time may feed it. If a feed raises, its text counts as added, and the next one reads all anew.

    Args:
        model: Backbone, head and pooling, for which `can_stream` holds.
        windows: From the answer so far, and whether the log was told of a too long question, to windows.
        harm_scores: From logits, float32 [windows], to P(harmful) of each, checked.
    """

    def __init__(
        self,
        model: PooledClassifier,
        windows: Callable[[str, bool], Sequence[Window]],
        harm_scores: Callable[[Tensor], list[float]],
    ) -> None:
        self._model = model
        self._windows = windows
        self._harm_scores = harm_scores
        self._answer = ""
        self._closed = False
        self._known: list[tuple[Window, Tensor]]
        self._cache: DynamicCache
        self._ids: list[int]
        self._of_tokens: Tensor
        self._forget()

    @torch.inference_mode()
    def feed(self, text: str) -> float:
        """P(harmful) of the whole answer so far, in [0, 1]; 0 while no character of it is legible.

        Raises:
            DetectorError: A score is not a finite number, or the stream is closed.
        """
        if self._closed:
            raise DetectorError("this stream is closed; open another for the next answer")
        self._answer += text
        try:
            return self._score()
        except BaseException:
            # What a broken pass left in a cache is unknown.
            self._forget()
            raise

    def close(self) -> None:
        """Frees the cache; `feed` raises from now on. Closing twice is fine."""
        self._closed = True
        self._answer = ""
        self._forget()

    def _score(self) -> float:
        windows = self._windows(self._answer, bool(self._known))
        for number, window in enumerate(windows):
            if number >= len(self._known) or self._known[number][0] != window:
                self._known[number : number + 1] = [(window, self._logit(window))]
        del self._known[len(windows) :]
        if not self._known:
            return 0.0
        return max(self._harm_scores(torch.stack([logit for _, logit in self._known])))

    def _logit(self, window: Window) -> Tensor:
        # What stands behind the answer cannot change a causal model's view of it.
        self._read(window.ids[: window.answer.stop])
        of_answer = self._of_tokens[window.answer.start :].unsqueeze(0)
        return self._model.pool(of_answer, torch.ones_like(of_answer, dtype=torch.int64)).squeeze(0)

    def _read(self, ids: list[int]) -> None:
        """Makes the cache hold these tokens; a window that begins keeps what it holds of the question."""
        kept = _common(self._ids, ids)
        if kept < len(self._ids):
            self._cache.crop(kept - len(self._ids))
            self._of_tokens = self._of_tokens[:kept]
        if kept < len(ids):
            fresh = torch.tensor([ids[kept:]], device=self._of_tokens.device)
            output = self._model.backbone(input_ids=fresh, past_key_values=self._cache, use_cache=True)
            logits = self._model.of_tokens(output.last_hidden_state).squeeze(0)
            self._of_tokens = torch.cat([self._of_tokens, logits])
        self._ids = ids

    def _forget(self) -> None:
        self._known = []
        # Without the model's configuration every layer keeps all tokens, sliding ones too, and so can be cut back.
        self._cache = DynamicCache()
        # The tokens in the cache, and the head's logit of each, float32.
        self._ids = []
        self._of_tokens = torch.empty(0, device=self._model.head.weight.device)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items both begin with."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
