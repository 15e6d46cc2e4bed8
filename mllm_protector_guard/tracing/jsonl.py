"""Records as JSON lines."""

from __future__ import annotations

import threading
from pathlib import Path

from mllm_protector_guard.tracing.record import GuardRecord

__all__ = ["JsonlSink"]


class JsonlSink:
    """Appends each record as one line to a file and flushes it; safe from several threads.

    Args:
        path: The file; it and its folder are made when missing. An existing file is continued.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()

    def emit(self, record: GuardRecord) -> None:
        """Writes one line.

        Raises:
            OSError: The file cannot be written; the guard logs this and the answer still leaves.
        """
        line = record.model_dump_json() + "\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
