"""Writes training files again without the rows that the check found to be spoilt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mllm_protector_guard.errors import ConfigError, DataError
from mllm_protector_guard.jsonl import Row, dump_row, read_rows
from mllm_protector_guard.training.findings import CheckReport

__all__ = ["write_clean"]


def write_clean(report: CheckReport, folder: Path, *, force: bool = False) -> dict[Path, int]:
    """Writes each checked file without the lines of `report.left_out`, and returns the rows of each new file.

    A file keeps its name, without `.gz`; rows are written as JSON lines with all their fields.

    Raises:
        ConfigError: A file is there already, or two files have the same name.
        OSError: A file cannot be written.
    """
    targets = _targets(report, folder, force=force)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for source, target in targets.items():
        left_out = report.left_out.get(source, {})
        draft = target.with_name(target.name + ".tmp")
        count = 0
        with draft.open("wb") as file:
            for line, fields in _readable_rows(source):
                if line not in left_out:
                    file.write(dump_row(fields))
                    count += 1
        draft.replace(target)
        written[target] = count
    return written


def _targets(report: CheckReport, folder: Path, *, force: bool) -> dict[Path, Path]:
    targets = {one.path: folder / one.path.name.removesuffix(".gz") for one in report.files}
    if len(set(targets.values())) < len(targets):
        raise ConfigError("two files have the same name; check them one by one, or rename one")
    known = {one.path.resolve() for one in [*report.files, *report.against]}
    for target in targets.values():
        if target.resolve() in known:
            raise ConfigError(f"{str(target)!r} is one of the inputs; give another folder")
        if target.exists() and not force:
            raise ConfigError(f"{str(target)!r} exists; give another folder, or --force to write over it")
    return targets


def _readable_rows(path: Path) -> Iterator[Row]:
    try:
        yield from read_rows(path, on_bad_line=lambda error: None)
    except DataError:  # the end is cut off, which the report has as a finding
        return
