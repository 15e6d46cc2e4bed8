"""Where rows go: standard output, or a file that a killed run can continue.

A file `OUT` has one line for each usable input line, in the same order, and each is written whole and
flushed. So the number of complete lines in it says how far a run came, whenever it was killed; there is no
second count that could disagree. Beside it, `OUT.run.json` holds the settings of the run and is written
before the first row. To resume, the half-written last line is cut off, the settings must be the same, and
every row that is there must be the row of the input at its place.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.jsonl import dump_row, read_rows

__all__ = ["FileSink", "RowSink", "StdoutSink", "open_sink"]


class RowSink(Protocol):
    """Takes rows."""

    def finished(self) -> Iterator[dict[str, Any]]:
        """The rows that an earlier run wrote, in order."""
        ...

    def write(self, fields: Mapping[str, Any]) -> None:
        """Writes one row and flushes it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_sink(
    path: Path | None, settings: Mapping[str, Any], *, resume: bool, force: bool, inputs: Sequence[Path | None]
) -> RowSink:
    """The file, or standard output for None.

    Args:
        path: The file to write.
        settings: What decides on the content of the rows; plain JSON values.
        resume: Whether to continue a file of an earlier run.
        force: Whether to write over a file.
        inputs: The files that are read, which must not be written.

    Raises:
        ConfigError: The file is there already, cannot be resumed, or is one of the inputs.
        OSError: The file cannot be written.
    """
    if resume and force:
        raise ConfigError("--resume continues a file and --force starts it over; give one of them")
    if path is None:
        if resume or force:
            raise ConfigError("--resume and --force are for a file; name it with -o FILE")
        return StdoutSink()
    if path.suffix == ".gz":
        raise ConfigError(f"{str(path)!r}: rows are written as plain JSON lines; give a name without .gz")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{str(path)!r} is no regular file; leave -o out and redirect standard output")
    if path.exists() and any(one is not None and one.exists() and path.samefile(one) for one in inputs):
        raise ConfigError(f"{str(path)!r} is the input; give -o another file")
    return FileSink(path, settings, resume=resume, force=force)


class StdoutSink:
    """Standard output as it is when the sink is made; a later redirection does not touch it."""

    def __init__(self) -> None:
        self._file = sys.stdout.buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def finished(self) -> Iterator[dict[str, Any]]:
        """Nothing."""
        return iter(())

    def write(self, fields: Mapping[str, Any]) -> None:
        """Writes one row and flushes it."""
        self._file.write(dump_row(fields))
        self._file.flush()


class FileSink:
    """A file of rows; see the module for how it is resumed.

    Args:
        path: The file; its folder must exist.
        settings: What decides on the content of the rows.
        resume: Continue a file of an earlier run; a missing or empty one is begun.
        force: Write over a file.

    Raises:
        ConfigError: The file is there already, cannot be resumed, or another run is writing it.
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool, force: bool) -> None:
        self.path = path
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._record = path.with_name(path.name + ".run.json")
        self._resumed = False
        self._file: BinaryIO = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "rb+")  # noqa: SIM115
        try:
            self._prepare(resume=resume, force=force)
        except BaseException:
            self._file.close()
            raise

    def _prepare(self, *, resume: bool, force: bool) -> None:
        _lock(self._file, self.path)
        filled = os.fstat(self._file.fileno()).st_size > 0
        if filled and not resume and not force:
            raise ConfigError(f"{str(self.path)!r} exists; give --resume to continue it or --force to start it over")
        if filled and resume:
            self._require_same_settings()
            self._cut_half_row()
            self._resumed = True
            return
        self._file.truncate(0)
        draft = self._record.with_name(self._record.name + ".tmp")
        draft.write_text(json.dumps(self._settings, indent=1) + "\n", encoding="utf-8")
        draft.replace(self._record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def finished(self) -> Iterator[dict[str, Any]]:
        """The rows that an earlier run wrote, in order.

        Raises:
            DataError: The file holds a line that no run wrote.
        """
        if self._resumed:
            for _, fields in read_rows(self.path):
                yield fields

    def write(self, fields: Mapping[str, Any]) -> None:
        """Writes one row and flushes it."""
        self._file.write(dump_row(fields))
        self._file.flush()

    def _require_same_settings(self) -> None:
        try:
            earlier = json.loads(self._record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{str(self.path)!r} cannot be resumed: {str(self._record)!r} with its settings is missing or damaged. "
                "Begin another file."
            ) from error
        names = sorted(earlier.keys() | self._settings.keys())
        changed = [name for name in names if earlier.get(name) != self._settings.get(name)]
        if changed:
            changes = ", ".join(f"{name} ({earlier.get(name)!r}, now {self._settings.get(name)!r})" for name in changed)
            raise ConfigError(
                f"{str(self.path)!r} was begun with other settings: {changes}. "
                "Give the same settings, or begin another file."
            )

    def _cut_half_row(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 65536, 0)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        self._file.truncate(end)
        self._file.seek(end)


def _lock(file: BinaryIO, path: Path) -> None:
    """Keeps a second run out of the file for as long as it is open."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{str(path)!r} is being written by another run; wait for it or give another file") from None
    except OSError:
        return  # a file system without locks
