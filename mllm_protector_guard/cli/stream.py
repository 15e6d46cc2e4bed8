"""The road that `score`, `rewrite` and `check` share: rows in, one batch at a time, rows out in the same order."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_protector_guard import __version__
from mllm_protector_guard.cli.console import EXIT_FINDING, Messages
from mllm_protector_guard.cli.sink import FileSink, RowSink, open_sink
from mllm_protector_guard.cli.source import RowSource, open_source
from mllm_protector_guard.errors import ConfigError, DataError, GuardError
from mllm_protector_guard.jsonl import Row

__all__ = ["Job", "Streams", "Work", "describe", "run_job"]

Work = Callable[[Sequence[Row]], Sequence[Mapping[str, Any]]]
"""The fields to add to each row, same order. A field `error` that is not None says that the row failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """The options of a command that name its input and output."""

    source: Path | None
    output: Path | None
    resume: bool
    force: bool
    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one command does with its rows.

    Attributes:
        verb: For the progress bar.
        adds: Names of all fields that the work may add.
        counts: The added field whose values are counted in the summary, if one is.
        settings: What decides on the added fields.
        load: Loads the models and returns the work; called when the first new row is there, with a function
            that takes messages for the user.
    """

    verb: str
    adds: Collection[str]
    counts: str | None = None
    settings: Mapping[str, Any]
    load: Callable[[Callable[[str], None]], Work]


@dataclass(slots=True)
class _Tally:
    rows: int = 0
    failed: int = 0
    values: Counter[str] = field(default_factory=Counter)

    def note(self, added: Mapping[str, Any], counts: str | None) -> None:
        self.rows += 1
        self.failed += added.get("error") is not None
        if counts is not None and added.get(counts) is not None:
            self.values[_label(counts, added[counts])] += 1

    def summary(self, malformed: int) -> str:
        parts = [f"{self.rows:,} rows"]
        parts += [f"{count:,} {label}" for label, count in sorted(self.values.items())]
        parts += [f"{self.failed:,} failed"] * bool(self.failed)
        parts += [f"{malformed:,} malformed lines"] * bool(malformed)
        return ", ".join(parts)


def _label(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return str(value)


def describe(row: Row, error: GuardError) -> str:
    """What went wrong with a row, for people."""
    return f"line {row[0]}: {type(error).__name__}: {error}"


def run_job(job: Job, streams: Streams) -> int:
    """Does the job and returns the exit code: 0, or 1 when a line was malformed or a row failed.

    Raises:
        GuardError: The options, the models or the input do not work.
        OSError: A file cannot be read or written.
    """
    messages = Messages(show_progress=streams.output is not None)
    settings = {"command": job.verb, "version": __version__, **job.settings}

    def report(error: DataError) -> None:
        messages.say(str(error) if error.path else f"standard input:{error}")

    tally = _Tally()
    with (
        open_sink(
            streams.output, settings, resume=streams.resume, force=streams.force, inputs=(streams.source,)
        ) as sink,
        open_source(streams.source, on_bad_line=report) as source,
        redirect_stdout(sys.stderr),  # standard output is for rows, whatever a detector prints
        messages.progress as progress,
    ):
        if source.is_terminal:
            messages.say("reading JSON lines from the terminal; end them with Ctrl-D")
        bar = progress.add_task(job.verb, total=source.size, rows=0)
        try:
            _skip_finished(job, sink, source, tally)
            work: Work | None = None
            replaced: set[str] = set()
            while batch := source.next_batch(streams.batch_size):
                if work is None:
                    work = job.load(messages.say)
                for (line, fields), added in zip(batch, work(batch), strict=True):
                    for name in (fields.keys() & set(job.adds)) - replaced:
                        replaced.add(name)
                        messages.say(f"line {line}: the field {name!r} of the input is replaced by the result")
                    kept = {name: value for name, value in fields.items() if name not in job.adds}
                    sink.write(kept | dict(added))
                    tally.note(added, job.counts)
                progress.update(bar, completed=source.position, rows=tally.rows)
        except KeyboardInterrupt:
            if isinstance(sink, FileSink):
                messages.say(f"{tally.rows:,} rows are in {str(sink.path)!r}; --resume goes on from there")
            raise
    messages.say(tally.summary(source.malformed))
    return EXIT_FINDING if tally.failed or source.malformed else 0


def _skip_finished(job: Job, sink: RowSink, source: RowSource, tally: _Tally) -> None:
    """Moves the source past the rows that the sink has, after a look that they are the same."""
    for number, written in enumerate(sink.finished(), start=1):
        row = source.next_row()
        if row is None:
            raise ConfigError(
                f"the output has {number:,} rows or more and the input {number - 1:,}: it was made from another input. "
                "Give that input, or --force to start over."
            )
        line, fields = row
        if _without(written, job.adds) != _without(fields, job.adds):
            raise ConfigError(
                f"row {number:,} of the output does not belong to line {line:,} of the input: it was made from another "
                "input. Give that input, or --force to start over."
            )
        tally.note(written, job.counts)


def _without(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
