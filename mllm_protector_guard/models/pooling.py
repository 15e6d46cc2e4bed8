"""From the hidden states of a decoder to one logit for an answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm_protector_guard.models.checkpoint import Pooling

__all__ = ["PooledClassifier"]


class PooledClassifier(nn.Module):
    """A decoder without its language-model head, pooled over the answer, and one linear unit (paper, section 3.1).

    The head is linear, so its output on the mean of some tokens is the mean of its outputs on each. "peak" uses that:
    every stretch of `peak_tokens` answer tokens gets a logit from one pass, and the worst is the answer's, so
    that a harmful paragraph is not thinned out by what stands around it.

    Args:
        backbone: Gives `last_hidden_state`, float [batch, tokens, hidden].
        pooling: "mean" over the answer's tokens, the "last" of them, or the "peak".
        peak_tokens: Length of a stretch; an answer of fewer tokens is one stretch.
    """

    def __init__(self, backbone: nn.Module, *, hidden_size: int, pooling: Pooling, peak_tokens: int = 64) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1)
        self.pooling = pooling
        self.peak_tokens = peak_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor) -> Tensor:
        """Logits, float32 [batch]; the high ones are the worst for "peak".

        Args:
            input_ids: int64 [batch, tokens], right-padded.
            attention_mask: int64 [batch, tokens], 1 for real tokens.
            answer_mask: int64 [batch, tokens], 1 for tokens of the answer, which stand together; at least one a row.
        """
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.pool(self.of_tokens(hidden), answer_mask)

    def of_tokens(self, hidden: Tensor) -> Tensor:
        """The head's logit of each token alone, float32 [batch, tokens].

        Args:
            hidden: Last hidden states of the backbone, [batch, tokens, hidden].
        """
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()
            return logits

    def pool(self, of_tokens: Tensor, answer_mask: Tensor) -> Tensor:
        """The answers' logits, float32 [batch], from `of_tokens`; `answer_mask` is that of `forward`."""
        if self.pooling == "last":
            positions = torch.arange(answer_mask.shape[1], device=of_tokens.device)
            last = (answer_mask * positions).argmax(dim=1, keepdim=True)
            return of_tokens.gather(1, last).squeeze(1)
        of_answer, length = of_tokens * answer_mask, answer_mask.sum(dim=1)
        if self.pooling == "mean":
            return of_answer.sum(dim=1) / length
        return _peak(of_answer, answer_mask, length, self.peak_tokens)


def _peak(of_tokens: Tensor, answer_mask: Tensor, length: Tensor, size: int) -> Tensor:
    """The highest mean over any `size` neighbouring answer tokens, float [batch]; over all if they are fewer."""
    sums = of_tokens.cumsum(dim=1)
    before = nn.functional.pad(sums, (size, 0))[:, : sums.shape[1]]
    stretch = length.clamp(max=size).unsqueeze(1)
    ends = (answer_mask == 1) & (answer_mask.cumsum(dim=1) >= stretch)
    return ((sums - before) / stretch).masked_fill(~ends, float("-inf")).amax(dim=1)
