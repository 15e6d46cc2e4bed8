"""Rows as they come in: from a file in full batches, from a pipe as soon as they are there."""

from __future__ import annotations

import os
import queue
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from mllm_protector_guard.errors import DataError
from mllm_protector_guard.jsonl import AnyText, Row, open_binary, parse_rows, validate_row
from mllm_protector_guard.types import Turn

__all__ = ["RowSource", "open_source", "turn_of"]

_LINGER_S = 0.05
"""How long a batch that is not full waits for the next line of a pipe."""


class _TurnFields(BaseModel):
    model_config = ConfigDict(extra="ignore")

    question: AnyText | None = None
    answer: AnyText


def turn_of(row: Row) -> Turn:
    """The turn of a row that came from a `RowSource`."""
    _, fields = row
    return Turn(question=fields.get("question"), answer=fields["answer"])


class RowSource:
    """Rows with a usable question and answer, in the order of their lines.

    Attributes:
        malformed: Bad lines so far.
        size: Bytes of the file; None when it is not known.
        is_terminal: Whether a person types the rows.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        path: Path | None,
        on_bad_line: Callable[[DataError], None],
        size: int | None,
    ) -> None:
        self.malformed = 0
        self.size = size
        self.is_terminal = size is None and file.isatty()
        self._file = file
        self._path = path
        self._on_bad_line = on_bad_line
        rows = self._usable_rows()
        self._live = _ReadAhead(rows) if size is None else None
        self._rows: Iterator[Row] = rows if self._live is None else self._live

    @property
    def position(self) -> int:
        """Bytes of the file that were read."""
        return self._file.tell() if self.size is not None else 0

    def next_row(self) -> Row | None:
        """The next row, waiting for it; None at the end.

        Raises:
            DataError: The input is cut off or damaged.
        """
        return next(self._rows, None)

    def next_batch(self, size: int) -> list[Row]:
        """The next rows, at most `size`; none at the end. A pipe's rows are not held back to fill a batch.

        Raises:
            DataError: The input is cut off or damaged.
        """
        batch: list[Row] = []
        deadline = 0.0
        while len(batch) < size:
            if batch and self._live is not None and not self._live.wait(deadline - time.monotonic()):
                break
            row = self.next_row()
            if row is None:
                break
            if not batch:
                deadline = time.monotonic() + _LINGER_S
            batch.append(row)
        return batch

    def _usable_rows(self) -> Iterator[Row]:
        for line, fields in parse_rows(open_binary(self._file), path=self._path, on_bad_line=self._note):
            try:
                validate_row(_TurnFields, fields, path=self._path, line=line)
            except DataError as error:
                self._note(error)
            else:
                yield line, fields

    def _note(self, error: DataError) -> None:
        self.malformed += 1
        self._on_bad_line(error)


@contextmanager
def open_source(path: Path | None, *, on_bad_line: Callable[[DataError], None]) -> Iterator[RowSource]:
    """The rows of a file, or of standard input for None; `on_bad_line` may be called from another thread.

    Raises:
        OSError: The file cannot be read.
    """
    file = _open(path)
    size = _size(file)
    try:
        yield RowSource(file, path=path, on_bad_line=on_bad_line, size=size)
    finally:
        if size is not None:  # else a thread may still wait on it, and closing would wait for the thread
            file.close()


def _open(path: Path | None) -> BinaryIO:
    if path is not None:
        return path.open("rb")
    try:
        # A handle of its own: the thread that waits on it must not hold the lock of sys.stdin when Python ends.
        return open(os.dup(sys.stdin.fileno()), "rb")
    except (OSError, ValueError):
        return sys.stdin.buffer


def _size(file: BinaryIO) -> int | None:
    try:
        status = os.fstat(file.fileno())
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


class _ReadAhead(Iterator[Row]):
    """Reads rows in a thread, so that one can ask whether the next is there."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._queue: queue.Queue[Row | BaseException | None] = queue.Queue(maxsize=1024)
        self._next: Row | BaseException | None = None
        self._has_next = False
        threading.Thread(target=self._read, name="mllm-protector-stdin", daemon=True).start()

    def __next__(self) -> Row:
        if not self._has_next:
            self._take(None)
        if self._next is None:
            raise StopIteration
        if isinstance(self._next, BaseException):
            raise self._next
        self._has_next = False
        return self._next

    def wait(self, timeout_s: float) -> bool:
        """Whether the next row, or the end, came within the time."""
        if not self._has_next:
            try:
                self._take(max(timeout_s, 0.0))
            except queue.Empty:
                return False
        return True

    def _take(self, timeout_s: float | None) -> None:
        self._next = self._queue.get(timeout=timeout_s)
        self._has_next = True

    def _read(self) -> None:
        try:
            for row in self._rows:
                self._queue.put(row)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)
