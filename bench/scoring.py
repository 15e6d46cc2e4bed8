"""Times the default detector against an encoder of the size that other guards use.

For answers of several lengths, alone and in batches, both score the same texts in the same run, in turns, in float32
and in bfloat16. The encoder has the shape of RoBERTa-base (125 million parameters, as in Detoxify and LLM Guard) and
random weights; it reads answers alone in windows of 512 tokens, and its tokens come from the detector's tokenizer.
The detector reads the question and its template besides. Figures are medians and quartiles over the rounds; ratios are
taken within a round. A second table says where the time of one score goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rounds import CLOCKS, Spread, alternated
from timing import QUESTION, environment, options_of
from transformers import PreTrainedTokenizerBase, RobertaConfig, RobertaForSequenceClassification

from mllm_protector_guard import Turn, load_detector
from mllm_protector_guard.models.backbone import isolated
from mllm_protector_guard.models.detector import TransformersDetector, pad, tensors
from mllm_protector_guard.models.legible import legible
from mllm_protector_guard.models.prompts import encode, special_tokens
from mllm_protector_guard.models.windows import windows

PROSE = (
    "Choose a sunny place and look at the soil before you buy anything, because most plants fail for want of drainage. "
    "Water in the morning, mulch against weeds, and give every plant the room it will need when it has grown. "
)
LENGTHS, BATCHES, DTYPES = (64, 192, 512, 2_048), (1, 8, 64), ("float32", "bfloat16")
# A cell of more tokens gets fewer rounds, but two, for one would have no spread.
TOKENS_OF_ALL_ROUNDS = 40_000
STAGES_TOKENS, STAGES_ROUNDS = 192, 15
WINDOW = 512
ROBERTA_BASE = RobertaConfig(max_position_embeddings=WINDOW + 2, type_vocab_size=1, layer_norm_eps=1e-5)


class Encoder:
    """A random classifier that reads answers alone in windows of 512 tokens, none of which overlap."""

    def __init__(
        self, shape: RobertaConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: str
    ) -> None:
        self._tokenizer = tokenizer
        self._device = device
        with isolated():
            model = RobertaForSequenceClassification(shape)
        self._model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
        self._pass_tokens = 4_096 if device.type == "cpu" else 32_768  # as our detector

    @torch.inference_mode()
    def score(self, turns: Sequence[Turn]) -> list[float]:
        """A score of each answer, that of its worst window."""
        found = self._tokenizer([turn.answer for turn in turns], add_special_tokens=False)["input_ids"]
        parts = [(i, ids[at : at + WINDOW]) for i, ids in enumerate(found) for at in range(0, len(ids), WINDOW)]
        parts.sort(key=lambda part: len(part[1]))
        rows = max(self._pass_tokens // len(parts[-1][1]), 1)
        scores = [0.0] * len(turns)
        for start in range(0, len(parts), rows):
            some = parts[start : start + rows]
            input_ids = pad([ids for _, ids in some], self._model.config.pad_token_id).to(self._device)
            mask = pad([[1] * len(ids) for _, ids in some], 0).to(self._device)
            logits = self._model(input_ids=input_ids, attention_mask=mask).logits.float()
            for (i, _), value in zip(some, torch.sigmoid(logits).amax(dim=1).tolist(), strict=True):
                scores[i] = max(scores[i], value)
        return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """So many answers of so many tokens, scored by both.

    Attributes:
        seconds: By dtype and contestant ("ours", "encoder"), one a round.
    """

    tokens: int
    batch: int
    seconds: dict[str, dict[str, list[float]]]

    def spread_ms(self, dtype: str, who: str) -> Spread:
        """Milliseconds an answer."""
        return Spread.of(seconds * 1e3 / self.batch for seconds in self.seconds[dtype][who])

    def ratio(self, dtype: str) -> Spread:
        """Our time over that of the encoder."""
        of = self.seconds[dtype]
        return Spread.of(a / b for a, b in zip(of["ours"], of["encoder"], strict=True))


def answers(tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> list[Turn]:
    """Different answers of `tokens` tokens."""
    prose = PROSE * (tokens // 30 + 2)
    texts = [f"Advice {number}. {prose}" for number in range(count)]
    cut = [tokenizer.decode(ids[:tokens]) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [Turn(question=QUESTION, answer=text) for text in cut]


def measure(
    detectors: dict[str, TransformersDetector], encoders: dict[str, Encoder], *, tokens: int, batch: int, **timed: Any
) -> Cell:
    """One cell; the detectors and encoders are given by dtype, and `timed` goes to `alternated`."""
    turns = answers(next(iter(detectors.values()))._ready().tokenizer, tokens, batch)
    both = {"ours": detectors, "encoder": encoders}
    calls = {(dtype, who): partial(models[dtype].score, turns) for who, models in both.items() for dtype in models}
    named = {f"{dtype} {who}": call for (dtype, who), call in calls.items()}
    for dtype, who in calls:
        both[who][dtype].score(turns[: max(1024 // tokens, 1)])
    found = alternated(named, **timed)
    seconds = {dtype: {who: found[f"{dtype} {who}"] for who in both} for dtype in detectors}
    return Cell(tokens=tokens, batch=batch, seconds=seconds)


def stages(detector: TransformersDetector, turn: Turn, **timed: Any) -> dict[str, Spread]:
    """Milliseconds of each step of one score of a turn of one window."""
    loaded = detector._ready()
    assert loaded.pooled is not None
    model, special = loaded.pooled, special_tokens(loaded.tokenizer)
    encoded = encode(turn, detector._template, loaded.tokenizer)
    found = list(windows(encoded, detector.config, loaded.max_tokens))
    text = detector._template.fill(turn.question, turn.answer)[0]
    input_ids, attention_mask, answer_mask = tensors(found, loaded.tokenizer.pad_token_id, loaded.device)

    def backbone() -> torch.Tensor:
        states = model.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return states.sum().cpu()  # waits for a GPU

    hidden = model.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    calls: dict[str, Callable[[], object]] = {
        "score, all of it": lambda: detector.score([turn]),
        "backbone": backbone,
        "legible view": lambda: [legible(part or "", special) for part in (turn.question, turn.answer)],
        "tokenizer": lambda: loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True),
        "view, tokenizer, prompt": lambda: encode(turn, detector._template, loaded.tokenizer),
        "windows": lambda: list(windows(encoded, detector.config, loaded.max_tokens)),
        "tensors": lambda: tensors(found, loaded.tokenizer.pad_token_id, loaded.device),
        "head and pooling": lambda: model.pool(model.of_tokens(hidden), answer_mask),
    }
    with torch.inference_mode():
        alternated(calls, 1)
        return {what: Spread.of(s * 1e3 for s in times) for what, times in alternated(calls, **timed).items()}


def table(title: str, cells: list[Cell]) -> Table:
    """Milliseconds an answer of both, and our share of the encoder's."""
    result = Table(title=title, caption="medians (quartiles) of milliseconds an answer; ratio: ours over the encoder's")
    for column in ("tokens", "batch", "rounds", "dtype", "ours", "encoder", "ratio", "ours, answers/s"):
        result.add_column(column, justify="right")
    for cell in cells:
        for dtype, of in cell.seconds.items():
            ours = cell.spread_ms(dtype, "ours")
            result.add_row(
                *(f"{cell.tokens:,}", str(cell.batch), str(len(of["ours"])), dtype),
                *(ours.shown(",.1f"), cell.spread_ms(dtype, "encoder").shown(",.1f")),
                *(cell.ratio(dtype).shown(".2f"), f"{1e3 / ours.median:,.1f}"),
            )
    return result


def stages_table(found: dict[str, Spread]) -> Table:
    """Milliseconds and share of each step."""
    result = Table(title=f"Where the time of one score of {STAGES_TOKENS} tokens goes, float32")
    for column in ("step", "ms", "share"):
        result.add_column(column, justify="left" if column == "step" else "right")
    whole = found["score, all of it"].median
    for what, spread in found.items():
        result.add_row(what, spread.shown(",.3f"), f"{spread.median / whole:.2%}")
    return result


def main() -> None:
    """Prints two tables, or JSON."""
    parser = options_of(__doc__)
    parser.set_defaults(rounds=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="of an answer")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="answers a call")
    parser.add_argument("--quick", action="store_true", help="64 and 192 tokens, 1 and 8 answers, 3 rounds")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu leaves out what other programs take")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.batch, options.rounds = (64, 192), (1, 8), 3
    clock = CLOCKS[options.clock]
    dtypes = DTYPES if options.dtype == "auto" else (options.dtype,)
    detectors = {dtype: load_detector(options.model, device=options.device, dtype=dtype) for dtype in dtypes}
    first = detectors[dtypes[0]]
    tokenizer, device = first._ready().tokenizer, first._ready().device
    encoders = {dtype: Encoder(ROBERTA_BASE, tokenizer, device, dtype) for dtype in dtypes}
    sizes = [(tokens, batch) for tokens in options.tokens for batch in options.batch]
    cells = []
    for tokens, batch in track(sizes, description="cells", console=Console(stderr=True)):
        rounds = min(options.rounds, max(TOKENS_OF_ALL_ROUNDS // (tokens * batch), 2))
        cells.append(measure(detectors, encoders, tokens=tokens, batch=batch, rounds=rounds, clock=clock))
    (turn,) = answers(tokenizer, STAGES_TOKENS, 1)
    steps = stages(first, turn, rounds=STAGES_ROUNDS, clock=clock)
    if options.json:
        about = {"model": options.model, "clock": options.clock, **environment(first)}
        found = {"cells": [asdict(c) for c in cells], "stages_ms": {what: asdict(s) for what, s in steps.items()}}
        print(json.dumps({**about, **found}, indent=2))
        return
    Console().print(table(f"{options.model} against a RoBERTa-base, {options.clock} time", cells))
    Console().print(stages_table(steps))


if __name__ == "__main__":
    main()
