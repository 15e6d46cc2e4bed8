"""Whether anything may be fetched."""

from __future__ import annotations

import os

__all__ = ["offline"]


def offline(local_files_only: bool | None = None) -> bool:
    """True if downloads are forbidden: by the argument, or where it is None by `MLLM_PROTECTOR_OFFLINE`."""
    if local_files_only is not None:
        return local_files_only
    return os.environ.get("MLLM_PROTECTOR_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")
