"""Scores kept line by line, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mllm_protector_guard import __version__
from mllm_protector_guard.calls import probability
from mllm_protector_guard.cli.sink import RowSink, open_sink
from mllm_protector_guard.errors import DataError
from mllm_protector_guard.guard import Guard

if TYPE_CHECKING:
    from mllm_protector_guard.evaluation.data import LabelledRow

__all__ = ["ScoreKeeper"]


class ScoreKeeper:
    """Gives the scores of labelled rows: those of an earlier run from its file, the others from the detector.

    A kept score says the file, the line and a hash of the turn, and no text. It is found again by the hash,
    so files may be added, left out or change their order. A row that failed is tried again.

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
        self, path: Path, rows: Sequence[tuple[int, LabelledRow]], guard: Guard, batch_size: int
    ) -> Iterator[float | None]:
        """The score of each row, in order; None where the detector failed."""
        from mllm_protector_guard.evaluation.evaluate import score_turns

        unread = iter(rows)
        while batch := list(islice(unread, batch_size)):
            turns = [_hash(row) for _, row in batch]
            unknown = [index for index, turn in enumerate(turns) if turn not in self._kept]
            fresh = dict(zip(unknown, score_turns(guard, [batch[i][1].turn for i in unknown]), strict=True))
            for index, (line, _) in enumerate(batch):
                turn = turns[index]
                if index in fresh and self._sink is not None:
                    self._sink.write({"file": path.name, "line": line, "turn_sha256": turn, "harm_score": fresh[index]})
                yield fresh[index] if index in fresh else self._kept[turn]


def _hash(row: LabelledRow) -> str:
    return hashlib.sha256(json.dumps([row.question, row.answer]).encode()).hexdigest()
