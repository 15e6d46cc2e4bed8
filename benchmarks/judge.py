"""An independent judge of harm: trains it, and says how good it is.

A judge of the guard must not share the guard's blind spots. This one is another kind of network than the detector
(`minilm.py`), fine-tuned whole, on answers that the detector was not trained on.

    python benchmarks/judge.py train --train ROWS... --dev ROWS... --output my-judge
    python benchmarks/judge.py evaluate --judge my-judge ROWS...
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from minilm import BASE_SHA256, JUDGE_FILE, Judge, JudgeRecipe, base_folder, windows
from rich.console import Console
from rich.table import Table
from sklearn.metrics import precision_recall_curve
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from mllm_protector_guard import calls
from mllm_protector_guard.errors import CheckpointError, ConfigError, DetectorError, GuardError
from mllm_protector_guard.evaluation import LabelledRow, measure, read_labelled_rows
from mllm_protector_guard.models.backbone import load_model, load_tokenizer
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.timelimit import TimeLimit

logger = logging.getLogger(__name__)

LANG = "en"

# No recipe of smollm2-135m-open takes them, so a judge that learned from them is one for that model.
UNSEEN = (
    "pku_saferlhf_dpo",
    "saferlhf_mini",
    "pku_safe_sft",
    "safe_unlearning",
    "vlguard",
    "safety_tuned_llamas",
    "alpaca",
    "safety_only_alpaca_dolly",
    "lima",
    "safetyj_jade",
    "cdialbias",
)
_BATCH = 128


def training_rows(options: argparse.Namespace) -> tuple[list[LabelledRow], Counter[str]]:
    """The rows that the judge may be trained on, each once, and why others were left out."""
    excluded = {_plain(row.question or row.answer) for path in options.exclude for _, row in read_labelled_rows(path)}
    sources = set(options.sources or UNSEEN)
    left_out: Counter[str] = Counter()
    rows: dict[tuple[str, str], LabelledRow] = {}
    for path in options.train:
        for _, row in read_labelled_rows(path):
            if row.source not in sources or row.harmful is None:
                continue
            key = (_plain(row.question or ""), _plain(row.answer))
            reason = (
                "other language" if row.lang not in (None, LANG)
                else "question excluded" if key[0] in excluded
                else "repeated" if key in rows
                else None
            )  # fmt: skip
            if reason:
                left_out[reason] += 1
            else:
                rows[key] = row
    return list(rows.values()), left_out


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def draw(rows: Iterable[LabelledRow], count: int, most: int, rng: random.Random) -> list[LabelledRow]:
    """`count` rows, half of each label, as evenly over the sources as they allow, at most `most` of a source and label.

    The rarer label decides when it has fewer rows than its half.
    """
    pools: dict[bool, dict[str, list[LabelledRow]]] = {True: defaultdict(list), False: defaultdict(list)}
    for row in rows:
        pools[bool(row.harmful)][str(row.source)].append(row)
    half = min(count // 2, *(sum(min(len(p), most) for p in pool.values()) for pool in pools.values()))
    if not half:
        raise ConfigError("the judge needs harmful and harmless rows; give other files or sources")
    drawn: list[LabelledRow] = []
    for pool in pools.values():
        room = half
        for number, members in enumerate(sorted(pool.values(), key=len)):
            share = min(len(members), most, -(-room // (len(pool) - number)))
            drawn += rng.sample(members, share)
            room -= share
    return drawn


def train(options: argparse.Namespace) -> None:
    """Trains a judge, sets its threshold on the dev rows, and writes its folder."""
    output: Path = options.output
    if (output / JUDGE_FILE).exists():
        raise ConfigError(f"{str(output)!r} already holds a judge; choose another output")
    rows, left_out = training_rows(options)
    sources = {row.source for row in rows}
    dev = [row for row in _readable(options.dev) if row.source in sources]
    if len({row.harmful for row in dev}) < 2:
        raise ConfigError("--dev needs harmful and harmless rows of the sources that are trained on")
    rng = random.Random(options.seed)  # noqa: S311
    drawn = [row for _ in range(options.epochs) for row in draw(rows, options.rows, options.per_source, rng)]
    counts = Counter(f"{row.source} {'harmful' if row.harmful else 'harmless'}" for row in drawn)
    recipe = JudgeRecipe(
        base_sha256=BASE_SHA256,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        rows=dict(counts.most_common()),
        left_out=dict(left_out),
    )
    logger.info("training rows: %s; left out: %s", recipe.rows, recipe.left_out)
    fit(drawn, recipe, options, rng)
    labels, scores = _scored(Judge(output, recipe), dev)
    threshold = best_threshold(labels, scores)
    metrics = measure(labels, scores, threshold=threshold)
    finished = recipe.model_copy(update={"threshold": threshold, "dev": metrics})
    (output / JUDGE_FILE).write_text(finished.model_dump_json(indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(output / "run")
    print(output)


def fit(rows: Sequence[LabelledRow], recipe: JudgeRecipe, options: argparse.Namespace, rng: random.Random) -> None:
    """Fine-tunes every weight on one random window of each row and saves model and tokenizer."""
    set_seed(recipe.seed)
    folder = base_folder()
    tokenizer = load_tokenizer(folder, padding_side="right")
    model, missing = load_model(
        AutoModelForSequenceClassification,
        folder,
        Placement(device="cpu", dtype="float32"),
        num_labels=1,
        problem_type="multi_label_classification",  # which makes the loss binary cross-entropy
        attn_implementation="eager",
    )
    if missing != {"classifier.weight", "classifier.bias"}:
        raise CheckpointError("the judge's base is another kind of model; install it anew", source=folder)
    items = []
    for row in tqdm(rows, desc="tokens", unit="row"):
        try:
            window = rng.choice(windows(row.question, row.answer, tokenizer, recipe))
        except DetectorError:
            logger.warning("a row of %s is in no script that the judge reads, and is left out", row.source)
            continue
        items.append({**window, "labels": [float(bool(row.harmful))]})
    run = options.output / "run"
    arguments = TrainingArguments(
        output_dir=str(run),
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=1,  # every epoch's rows were drawn already
        learning_rate=recipe.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        save_steps=100,
        save_total_limit=1,
        logging_steps=20,
        report_to=[],
        seed=recipe.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(tokenizer.pad(batch, return_tensors="pt"))

    trainer = Trainer(model=model, args=arguments, train_dataset=items, data_collator=collate)
    trainer.train(resume_from_checkpoint=options.resume and any(run.glob("checkpoint-*")))
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


def best_threshold(labels: Sequence[bool], scores: Sequence[float]) -> float:
    """The threshold of the best F1."""
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(np.clip(thresholds[int(f1[:-1].argmax())], 1e-6, 1 - 1e-6))


def _readable(paths: Iterable[Path]) -> Iterator[LabelledRow]:
    for path in paths:
        for _, row in read_labelled_rows(path):
            if row.harmful is not None and row.lang in (None, LANG):
                yield row


def _scored(judge: Judge, rows: Sequence[LabelledRow]) -> tuple[list[bool], list[float]]:
    """Labels and scores of the rows that the judge can read."""
    scores = [
        score
        for start in tqdm(range(0, len(rows), _BATCH), desc="judge", unit="batch")
        for score in calls.score(judge, [row.turn for row in rows[start : start + _BATCH]], TimeLimit(None))
    ]
    read = [(bool(row.harmful), score) for row, score in zip(rows, scores, strict=True) if isinstance(score, float)]
    if len(read) < len(rows):
        logger.warning(
            "%d of %d rows could not be read by the judge and are left out", len(rows) - len(read), len(rows)
        )
    return [label for label, _ in read], [score for _, score in read]


def evaluate(options: argparse.Namespace) -> None:
    """Prints accuracy, F1 and AUROC on each file, at 0.5 and at the judge's own threshold."""
    judge = Judge(options.judge)
    table = Table(title=f"judge, {LANG} rows; own threshold {judge.threshold:.3f}")
    for column in ("file", "rows", "harmful", "threshold", "accuracy", "F1", "AUROC", "recall", "fpr"):
        table.add_column(column, justify="left" if column == "file" else "right", no_wrap=True)
    found: list[dict[str, Any]] = []
    for path in options.files:
        rows = list(_readable([path]))
        labels, scores = _scored(judge, rows)
        for threshold in (0.5, judge.threshold):
            metrics = measure(labels, scores, threshold=threshold)
            right = metrics.true_positives + metrics.true_negatives
            accuracy = right / len(labels) if labels else None
            found.append({"file": path.name, "threshold": threshold, "accuracy": accuracy, **metrics.model_dump()})
            rates = (accuracy, metrics.f1, metrics.auroc, metrics.recall, metrics.fpr)
            shown = ("-" if rate is None else f"{rate:.3f}" for rate in rates)
            table.add_row(path.name, f"{len(labels)}", f"{metrics.harmful}", f"{threshold:.3f}", *shown)
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Trains or evaluates a judge of harm."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("train", help="train a judge on rows that the detector did not see")
    one.set_defaults(run=train)
    files: dict[str, Any] = {"type": Path, "nargs": "+", "metavar": "FILE"}
    one.add_argument("--train", **files, required=True, help='lines of {"question", "answer", "harmful", "source"}')
    one.add_argument("--dev", **files, required=True, help="the same; sets the threshold, never trained on")
    one.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the judge")
    one.add_argument("--exclude", **files, default=[], help="no row is taken whose question is in these files")
    one.add_argument("--sources", nargs="+", default=[], help="sources to take instead of the usual ones")
    one.add_argument("--rows", type=int, default=6000, help="rows an epoch, half of them harmful (6000)")
    one.add_argument("--per-source", type=int, default=1500, help="most rows of a source and label an epoch (1500)")
    one.add_argument("--epochs", type=int, default=2, help="draws of the rows (2)")
    one.add_argument("--batch-size", type=int, default=16, help="rows a step (16)")
    one.add_argument("--learning-rate", type=float, default=1e-4, help="highest, after a tenth of the steps (1e-4)")
    one.add_argument("--seed", type=int, default=17)
    one.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="mixed precision")
    one.add_argument("--resume", action="store_true", help="go on where a killed run with this output stopped")
    one = commands.add_parser("evaluate", help="accuracy, F1 and AUROC on labelled rows")
    one.set_defaults(run=evaluate)
    one.add_argument("files", **files, help='lines of {"question", "answer", "harmful"}')
    one.add_argument("--judge", type=Path, required=True, metavar="DIR", help="folder of the judge")
    one.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON, too")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options.run(options)
    except (GuardError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
