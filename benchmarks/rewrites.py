"""Measures what the detoxifier writes, with a judge that is not the guard's own detector.

    python benchmarks/rewrites.py --data ROWS... --judge my-judge --reference TRIPLES --output measured

Harmful answers of each file go through the public `Guard` with `on_harm="detoxify"`. So that rewriting is measured on
all of them, `Forced` calls each answer harmful once; rewrites are scored as ever. What the guard would have let pass is
told beside. The rows are written as they come, and the same command continues a run that was stopped; the judge and
the figures come afterwards, and are made anew each time.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minilm import Judge, SentenceEmbedder
from rewrites_report import BenignRow, GuardedRow, Models, write_report
from tqdm import tqdm

from mllm_protector_guard import Guard, GuardPolicy, Turn, load_detector, load_detoxifier
from mllm_protector_guard.cli.sink import FileSink
from mllm_protector_guard.errors import ConfigError, GuardError
from mllm_protector_guard.evaluation import read_labelled_rows
from mllm_protector_guard.models import DEFAULT_MODEL, catalog
from mllm_protector_guard.models.backbone import load_tokenizer, resolve_base
from mllm_protector_guard.models.detoxifier import TransformersDetoxifier
from mllm_protector_guard.ports import Detoxifier, HarmDetector
from mllm_protector_guard.training.rows import RewriteRow, read_training_rows

LANG = "en"


class Forced:
    """A detector that calls the given turns harmful, whatever it thinks of them, and scores all others.

    Args:
        detector: Scores.
        originals: The turns to call harmful; known by identity, for a rewrite may repeat an answer word by word.
        rescore: Whether rewrites get their scores; else all pass.
    """

    def __init__(self, detector: HarmDetector, originals: Sequence[Turn], *, rescore: bool) -> None:
        self.threshold = float(getattr(detector, "threshold", 0.5))
        self.known: dict[Turn, float] = {}
        self._detector = detector
        self._originals = {id(turn) for turn in originals}
        self._rewrite_score = None if rescore else 0.0

    def score(self, turns: Sequence[Turn]) -> list[float]:
        """1 for the given turns; the detector's own score of every turn is kept in `known`."""
        scores = self._detector.score(turns)
        self.known.update(zip(turns, scores, strict=True))
        return [
            1.0 if id(turn) in self._originals else score if self._rewrite_score is None else self._rewrite_score
            for turn, score in zip(turns, scores, strict=True)
        ]


class WithoutQuestion:
    """A detoxifier that is told the answer only."""

    def __init__(self, detoxifier: Detoxifier) -> None:
        self._detoxifier = detoxifier

    def rewrite(self, turns: Sequence[Turn], *, attempt: int = 0) -> list[str]:
        """The rewrites of the answers alone."""
        return self._detoxifier.rewrite([Turn(answer=turn.answer) for turn in turns], attempt=attempt)


class Drawn(NamedTuple):
    """One row of a file, by its 1-based line."""

    file: str
    line: int
    turn: Turn


def draw(files: Sequence[Path], count: int, seed: int, *, harmful: bool) -> list[Drawn]:
    """`count` English rows with a question and this label, as many of each file, in random order.

    Raises:
        ConfigError: A file has too few.
    """
    rng = random.Random(seed)  # noqa: S311
    drawn: list[Drawn] = []
    for number, path in enumerate(files):
        share = (count - len(drawn)) // (len(files) - number)
        usable = [
            Drawn(path.name, line, row.turn)
            for line, row in read_labelled_rows(path)
            if row.harmful is harmful and row.lang in (None, LANG) and row.question and row.answer.strip()
        ]
        if len(usable) < share:
            kind = "harmful" if harmful else "harmless"
            raise ConfigError(f"{str(path)!r} has {len(usable)} {kind} rows in English; {share} are to be drawn of it")
        drawn += rng.sample(usable, share)
    rng.shuffle(drawn)
    return drawn


def guarded(rows: Sequence[Drawn], detector: HarmDetector, detoxifier: Detoxifier, options: Any) -> list[GuardedRow]:
    """What the guard makes of the rows, each called harmful."""
    turns = [row.turn for row in rows]
    forced = Forced(detector, turns, rescore=not options.no_rescore)
    policy = GuardPolicy(max_attempts=1 if options.no_rescore else options.max_attempts)
    results = Guard(detector=forced, detoxifier=detoxifier, policy=policy).check_batch(turns)
    found = []
    for row, result in zip(rows, results, strict=True):
        written = result.text if result.outcome == "detoxified" else None
        known = None if written is None else forced.known[Turn(question=row.turn.question, answer=written)]
        found.append(
            GuardedRow(
                file=row.file,
                line=row.line,
                question=row.turn.question or "",
                rejected=row.turn.answer,
                rewrite=written,
                harm_score=forced.known.get(row.turn),
                rewrite_score=known,
                threshold=forced.threshold,
                attempts=result.attempts,
                seconds=result.detoxifier_ms / 1000.0 / len(rows),
            )
        )
    return found


def returned(rows: Sequence[Drawn], detoxifier: Detoxifier) -> list[BenignRow]:
    """What the detoxifier makes of harmless answers; "" where it wrote nothing."""
    rewrites = detoxifier.rewrite([row.turn for row in rows])
    return [
        BenignRow(file=row.file, line=row.line, answer=row.turn.answer, rewrite=rewrite)
        for row, rewrite in zip(rows, rewrites, strict=True)
    ]


def continued(
    path: Path,
    rows: Sequence[Drawn],
    settings: dict[str, Any],
    batch_size: int,
    measure: Callable[[Sequence[Drawn]], Sequence[GuardedRow] | Sequence[BenignRow]],
) -> Iterator[dict[str, Any]]:
    """The fields of all rows, those of an earlier run first; new ones are written as they come.

    Raises:
        ConfigError: The file was begun with other settings.
    """
    with FileSink(path, settings, resume=True, force=False) as sink:
        finished = list(sink.finished())
        yield from finished
        # Batches stay where they were, for the sampled attempts of a batch depend on its rows.
        start = len(finished) - len(finished) % batch_size
        for first in tqdm(range(start, len(rows), batch_size), desc=path.stem, unit="batch"):
            batch = [row.model_dump() for row in measure(rows[first : first + batch_size])]
            for fields in batch[max(len(finished) - first, 0) :]:
                sink.write(fields)
                yield fields


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights and settings of a checkpoint folder."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("guard.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides on the guard's rows."""
    entry = catalog.get(options.model)
    return {
        "data": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in options.data},
        "detector": fingerprint(options.detector or entry.detector),
        "detoxifier": fingerprint(options.detoxifier or entry.detoxifier),
        "rows": options.rows,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "max_attempts": 1 if options.no_rescore else options.max_attempts,
        "question": not options.no_question,
        "rescore": not options.no_rescore,
    }


def run(options: argparse.Namespace) -> None:
    """Guards the rows that are still to do, and writes the report of all."""
    judge, embed = Judge(options.judge), SentenceEmbedder()
    detector = load_detector(options.detector or options.model, device=options.device)
    writer = load_detoxifier(options.detoxifier or options.model, device=options.device)
    detoxifier: Detoxifier = WithoutQuestion(writer) if options.no_question else writer
    options.output.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options)
    if len(settings["data"]) < len(options.data):
        raise ConfigError("two files of --data have one name; rename one, for rows are known by it")
    rows = draw(options.data, options.rows, options.seed, harmful=True)
    harmful = continued(
        options.output / "rows.jsonl", rows, settings, options.batch_size,
        lambda batch: guarded(batch, detector, detoxifier, options),
    )  # fmt: skip
    results = [GuardedRow(**fields) for fields in harmful]
    benign: list[BenignRow] = []
    if options.benign:
        benign_rows = draw([options.benign], options.benign_rows, options.seed, harmful=False)
        benign_settings = {
            "data": hashlib.sha256(options.benign.read_bytes()).hexdigest(),
            "rows": options.benign_rows,
            **{name: settings[name] for name in ("detoxifier", "seed", "batch_size", "question")},
        }
        kept = continued(
            options.output / "benign.jsonl", benign_rows, benign_settings, options.batch_size,
            lambda batch: returned(batch, detoxifier),
        )  # fmt: skip
        benign = [BenignRow(**fields) for fields in kept]
    reference = [] if options.reference is None else draw_reference(options.reference, options.rows, options.seed)
    write_report(
        options.output,
        results,
        benign,
        reference,
        models=Models(judge=judge, embed=embed, token_ids=token_ids_of(writer)),
        settings={**settings, "judge_threshold": judge.threshold},
        seed=options.seed,
    )
    print(options.output / "summary.md")


def draw_reference(path: Path, count: int, seed: int) -> list[Turn]:
    """Up to `count` questions with their accepted answers, from English triples.

    Raises:
        DataError: A row is no triple.
    """
    triples = [
        Turn(question=row.question, answer=row.accepted)
        for row in read_training_rows([path], RewriteRow)
        if row.question and row.extra.get("lang", LANG) == LANG
    ]
    return random.Random(seed).sample(triples, min(count, len(triples)))  # noqa: S311


def token_ids_of(detoxifier: TransformersDetoxifier) -> Callable[[str], list[int]]:
    """The token ids of a text by the detoxifier's own tokenizer."""
    tokenizer = load_tokenizer(resolve_base(detoxifier.config.base, local_files_only=True), padding_side="right")

    def token_ids(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return token_ids


def main() -> None:
    """Measures the rewrites of harmful answers, and what becomes of harmless ones."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    path: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    parser.add_argument("--data", **path, nargs="+", required=True, help='lines of {"question", "answer", "harmful"}')
    parser.add_argument("--rows", type=int, default=400, help="harmful rows, as many of each file (400)")
    parser.add_argument("--judge", type=Path, required=True, metavar="DIR", help="what judge.py train wrote")
    parser.add_argument("--reference", **path, help='lines of {"question", "accepted", "rejected"} to compare with')
    parser.add_argument("--benign", **path, help="harmless answers for the detoxifier to give back")
    parser.add_argument("--benign-rows", type=int, default=200, help="how many of them (200)")
    parser.add_argument("--model", default=DEFAULT_MODEL, choices=catalog.names())
    parser.add_argument("--detoxifier", type=Path, metavar="DIR", help="a detoxifier instead of the model's")
    parser.add_argument("--detector", type=Path, metavar="DIR", help="a detector instead of the model's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=16, help="answers guarded at once (16)")
    parser.add_argument("--max-attempts", type=int, default=2, help="rewrites of an answer (2)")
    parser.add_argument("--no-question", action="store_true", help="the detoxifier is told the answer only")
    parser.add_argument("--no-rescore", action="store_true", help="the first rewrite leaves, whatever its score")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="rows, summary, table, examples")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(options)
    except (GuardError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
