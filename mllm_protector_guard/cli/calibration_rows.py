"""The answers that `mllm-protector calibrate` reads, and their scores."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_protector_guard.cli.scores import ScoreKeeper
from mllm_protector_guard.errors import DataError
from mllm_protector_guard.guard import Guard

if TYPE_CHECKING:
    from mllm_protector_guard.evaluation.data import LabelledRow
    from mllm_protector_guard.training.calibrate import Floats
    from mllm_protector_guard.training.recalibrate import LabelledScores

__all__ = ["Answers", "read_answers", "score_answers"]


@dataclass(kw_only=True)
class Answers:
    """Rows of files, in order.

    Attributes:
        paths: The files.
        sha256: Of each file.
        by_file: Line numbers and rows of each file, without those that are only counted.
        blank: Rows whose answer is blank, which the guard never judges.
        unlabelled: Rows whose label is missing and needed.
        scores: P(harmful) of each row in [0, 1], or None where the detector failed; filled while scoring.
    """

    paths: list[Path] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    by_file: list[list[tuple[int, LabelledRow]]] = field(default_factory=list)
    blank: int = 0
    unlabelled: int = 0
    scores: list[float | None] = field(default_factory=list)

    @property
    def rows(self) -> list[LabelledRow]:
        """The rows of all files."""
        return [row for rows in self.by_file for _, row in rows]

    @property
    def labels(self) -> list[bool]:
        """Whether each row is labelled harmful."""
        return [row.harmful is True for row in self.rows]

    @property
    def questions(self) -> list[Hashable]:
        """What tells the question of each row; the answer stands in for an unknown one."""
        return [(row.question, row.answer if row.question is None else None) for row in self.rows]

    @property
    def failed(self) -> int:
        """Rows that could not be scored."""
        return sum(score is None for score in self.scores)

    def counts(self) -> dict[str, Any]:
        """How many rows there are, and of which files, as values that JSON holds."""
        files = [{"name": p.name, "sha256": digest} for p, digest in zip(self.paths, self.sha256, strict=True)]
        return {
            "rows": len(self.rows),
            "questions": len(set(self.questions)),
            "failed": self.failed,
            "blank": self.blank,
            "files": files,
        }

    def safe_scores(self) -> Floats:
        """The scores, float [rows], inf where there is none: the guard withholds such an answer."""
        import numpy as np

        return np.array([np.inf if score is None else score for score in self.scores])

    def labelled_scores(self) -> LabelledScores:
        """The scores with their labels, without rows that have no score."""
        import numpy as np

        from mllm_protector_guard.evaluation.bury import count_words
        from mllm_protector_guard.training.recalibrate import LabelledScores

        scored = [index for index, score in enumerate(self.scores) if score is not None]
        labels, questions, rows = self.labels, self.questions, self.rows
        return LabelledScores(
            scores=np.array([self.scores[index] for index in scored], dtype=np.float64),
            harmful=np.array([labels[index] for index in scored], dtype=bool),
            questions=tuple(questions[index] for index in scored),
            words=np.array([count_words(rows[index].answer) for index in scored], dtype=np.int64),
        )


def read_answers(paths: Sequence[Path], *, safe: bool) -> Answers:
    """The answers of the files.

    A malformed line is an error here: rows that went missing would bend the sample that a bound speaks of.

    Args:
        paths: JSON lines, gzipped or not.
        safe: Whether all answers are to be safe, labelled or not; else those without a label are counted only.

    Raises:
        DataError: A line is malformed, or a safe answer is labelled harmful.
        OSError: A file cannot be read.
    """
    from mllm_protector_guard.evaluation.data import read_labelled_rows

    answers = Answers()
    for path in paths:
        kept: list[tuple[int, LabelledRow]] = []
        for line, row in read_labelled_rows(path):
            if safe and row.harmful:
                raise DataError("labelled harmful, but a safe answer is expected; take it out", path=path, line=line)
            if not row.answer or row.answer.isspace():
                answers.blank += 1
            elif not safe and row.harmful is None:
                answers.unlabelled += 1
            else:
                kept.append((line, row))
        with path.open("rb") as file:
            answers.sha256.append(hashlib.file_digest(file, "sha256").hexdigest())
        answers.paths.append(path)
        answers.by_file.append(kept)
    return answers


def score_answers(answers: Answers, keeper: ScoreKeeper, guard: Guard, batch_size: int) -> Iterator[float | None]:
    """The score of each row, in order; None where the detector failed."""
    for path, rows in zip(answers.paths, answers.by_file, strict=True):
        yield from keeper.scores(path, rows, guard, batch_size)
