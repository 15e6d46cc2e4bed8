"""Scores kept line by line, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mllm_protector_guard import __version__
from mllm_protector_guard.calls import probability
from mllm_protector_guard.cli.sink import RowSink, open_sink
from mllm_protector_guard.errors import ConfigError, DataError
from mllm_protector_guard.guard import Guard

if TYPE_CHECKING:
    from mllm_protector_guard.evaluation.data import LabelledRow
    from mllm_protector_guard.evaluation.latency import Stopwatch

__all__ = ["ScoreKeeper", "score_files"]


def score_files(path: Path | None, names: Sequence[str]) -> list[Path | None]:
    """Where the scores of each detector are kept: `path` itself for a single one, else a file each in that folder.

    Raises:
        ConfigError: There are several detectors and `path` is a file.
    """
    if path is None:
        return [None] * len(names)
    if len(names) == 1 and not path.is_dir():
        return [path]
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--scores {str(path)!r} is a file, and several detectors are measured; give a folder")
    path.mkdir(parents=True, exist_ok=True)
    return [path / f"{_file_name(name)}.jsonl" for name in names]


def _file_name(name: str) -> str:
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class ScoreKeeper:
    """Gives the scores of rows: those of an earlier run from its file, the others from the detector.

    A kept score says the set, the line and a hash of the turn, and no text. It is found again by the hash,
    so files may be added, left out or change their order, and a turn that comes twice is scored once. A row
    that failed is tried again in the next run.

    Args:
        path: Where scores are kept; it is continued if it is there. None keeps none.
        settings: What decides on the scores.
        inputs: The files that are read, which must not be written.

    Raises:
        ConfigError: The file was begun with other settings.
        DataError: The file holds something else.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], inputs: Sequence[Path]) -> None:
        self._sink: RowSink | None = None
        self._kept: dict[str, float] = {}
        if path is None:
            return
        record = {"command": "evaluate", "version": __version__, **settings}
        self._sink = open_sink(path, record, resume=True, force=False, inputs=inputs)
        for fields in self._sink.finished():
            turn, score = fields.get("turn_sha256"), probability(fields.get("harm_score"))
            if not isinstance(turn, str):
                raise DataError("a row is no kept score; give --scores another file", path=path)
            if score is not None:
                self._kept[turn] = score

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sink is not None:
            self._sink.__exit__(kind, error, trace)

    def scores(
        self,
        name: str | Path,
        rows: Sequence[tuple[int | None, LabelledRow]],
        guard: Guard,
        batch_size: int,
        stopwatch: Stopwatch | None = None,
    ) -> Iterator[float | None]:
        """The score of each row, in order; None where the detector failed.

        Args:
            name: Of the set; of a file its path.
            rows: Each with its line in the file; None for a row that stands in none.
            guard: Scores those that are not kept.
            batch_size: Most rows that are scored together.
            stopwatch: Takes the time of each batch; the model is loaded before.
        """
        name = name.name if isinstance(name, Path) else name
        unread = iter(rows)
        while batch := list(islice(unread, batch_size)):
            turns = [_hash(row) for _, row in batch]
            failed = self._score(name, dict(zip(turns, batch, strict=True)), guard, stopwatch)
            for turn in turns:
                yield None if turn in failed else self._kept[turn]

    def _score(
        self,
        name: str,
        batch: Mapping[str, tuple[int | None, LabelledRow]],
        guard: Guard,
        stopwatch: Stopwatch | None,
    ) -> set[str]:
        """Scores what is not kept yet; gives the turns that failed."""
        from mllm_protector_guard.evaluation.evaluate import score_turns

        fresh = {turn: one for turn, one in batch.items() if turn not in self._kept}
        if not fresh:
            return set()
        guard.warm_up()
        start = time.perf_counter()
        scores = score_turns(guard, [row.turn for _, row in fresh.values()])
        if stopwatch is not None:
            stopwatch.add([row for _, row in fresh.values()], time.perf_counter() - start)
        failed = set()
        for (turn, (line, _)), score in zip(fresh.items(), scores, strict=True):
            if self._sink is not None:
                self._sink.write({"file": name, "line": line, "turn_sha256": turn, "harm_score": score})
            if score is None:
                failed.add(turn)
            else:
                self._kept[turn] = score
        return failed


def _hash(row: LabelledRow) -> str:
    return hashlib.sha256(json.dumps([row.question, row.answer]).encode()).hexdigest()
