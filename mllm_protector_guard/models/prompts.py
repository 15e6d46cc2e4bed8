"""How a turn becomes the text that a model reads.

Models never see a user's text raw but its legible view, in which invisible characters, disguised spelling and
spelled-out special tokens have no power. What leaves the guard is always the original text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models.legible import legible
from mllm_protector_guard.types import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DETECTOR_TEMPLATES",
    "DETOXIFIER_TEMPLATES",
    "EncodedTurn",
    "PromptTemplate",
    "encode",
    "encode_all",
    "shorten",
    "shorten_question",
    "special_tokens",
    "template",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """A prompt in which `{question}` and `{answer}` stand for the texts of the turn.

    Attributes:
        known: Used when the question is known.
        unknown: Used when it is not; without `{question}`.
        add_special_tokens: Whether the tokenizer adds its own (a BOS, as Llama's does).
        end_of_turn: Text that ends a rewrite, besides the tokenizer's EOS.
    """

    known: str
    unknown: str
    add_special_tokens: bool
    end_of_turn: str | None = None

    def fill(self, question: str | None, answer: str) -> tuple[str, int, int]:
        """The prompt, and the character range [start, end) of the answer in it."""
        pattern = self.unknown if question is None else self.known
        before, after = pattern.split("{answer}")
        before = before.replace("{question}", question or "")
        return before + answer + after, len(before), len(before) + len(answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTurn:
    """Token ids before, of, and after the answer in a prompt; put together they are the prompt.

    `answer` is empty if no character of the answer is legible.
    """

    prefix: list[int]
    answer: list[int]
    suffix: list[int]


DETECTOR_TEMPLATES = {
    "chatml": PromptTemplate(
        known="<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>",
        unknown="<|im_start|>assistant\n{answer}<|im_end|>",
        add_special_tokens=False,
    ),
    # The input of the detectors published with the paper (pipilurj/MLLM-protector, Apache-2.0).
    "protector": PromptTemplate(
        known="Question: {question}\n\nAnswer: {answer}", unknown="{answer}", add_special_tokens=True
    ),
    "answer_only": PromptTemplate(known="{answer}", unknown="{answer}", add_special_tokens=True),
}

# Shares its beginning with the detector's "chatml", so that one prefix cache can serve both models.
_CHATML_REWRITE = (
    "<|im_start|>user\nWrite a harmless answer in place of the one above.<|im_end|>\n<|im_start|>assistant\n"
)

DETOXIFIER_TEMPLATES = {
    "chatml": PromptTemplate(
        known=DETECTOR_TEMPLATES["chatml"].known + "\n" + _CHATML_REWRITE,
        unknown=DETECTOR_TEMPLATES["chatml"].unknown + "\n" + _CHATML_REWRITE,
        add_special_tokens=False,
        end_of_turn="<|im_end|>",
    ),
    # The prompts of the published detoxifier (pipilurj/MLLM-protector, Apache-2.0), space before \n included.
    "protector": PromptTemplate(
        known=(
            "You are given a question and a response, the response may contain sensitive or harmful information, "
            "Please rewrite the response to make it harmless. \n"
            "Question: {question}\nOriginal response: {answer}\nCorrected response: "
        ),
        unknown=(
            "You are given a response which may contain sensitive or harmful information, "
            "Please rewrite the response to make it harmless. \n"
            "Original response: {answer}\nCorrected response: "
        ),
        add_special_tokens=True,
    ),
}


def template(name: str, templates: dict[str, PromptTemplate]) -> PromptTemplate:
    """The template of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in templates:
        raise ConfigError(f"unknown template {name!r}; known: {sorted(templates)}")
    return templates[name]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The texts that the tokenizer reads as one special token wherever they stand."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def encode(turn: Turn, pattern: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> EncodedTurn:
    """The turn as tokens, whole; the same for training and for use.

    Args:
        turn: Any texts; the model sees their legible view.
        pattern: The prompt.
        tokenizer: A fast one, for it must tell where its tokens stand in the text.
    """
    return encode_all([turn], pattern, tokenizer)[0]


def encode_all(turns: Sequence[Turn], pattern: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> list[EncodedTurn]:
    """`encode` of each turn; the tokenizer, which has threads of its own, sees all of them at once."""
    if not turns:
        return []
    special = special_tokens(tokenizer)
    answers = [legible(turn.answer, special) for turn in turns]
    questions = [None if turn.question is None else legible(turn.question, special) for turn in turns]
    filled = [pattern.fill(question, answer) for question, answer in zip(questions, answers, strict=True)]
    encoded = tokenizer(
        [text for text, _, _ in filled], add_special_tokens=pattern.add_special_tokens, return_offsets_mapping=True
    )
    return [
        _split(ids, offsets, start, end, blank=not answer.strip())
        for ids, offsets, (_, start, end), answer in zip(
            encoded["input_ids"], encoded["offset_mapping"], filled, answers, strict=True
        )
    ]


def _split(ids: list[int], offsets: list[tuple[int, int]], start: int, end: int, *, blank: bool) -> EncodedTurn:
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and start < last > first]
    if not inside or blank:
        return EncodedTurn(prefix=ids, answer=[], suffix=[])
    return EncodedTurn(prefix=ids[: inside[0]], answer=ids[inside[0] : inside[-1] + 1], suffix=ids[inside[-1] + 1 :])


def shorten(ids: list[int], limit: int) -> list[int]:
    """The ids without their middle, if there are more than `limit`."""
    return ids if len(ids) <= limit else [*ids[: limit - limit // 2], *ids[len(ids) - limit // 2 :]]


def shorten_question(ids: list[int], limit: int) -> list[int]:
    """`shorten` for what stands before an answer; says in the log if it took something away."""
    if len(ids) > limit:
        logger.warning("a question of %d tokens is read without its middle; at most %d are read", len(ids), limit)
    return shorten(ids, limit)
