"""Whether anything may be fetched."""

from __future__ import annotations

import os

__all__ = ["offline"]


def offline(local_files_only: bool | None = None) -> bool:
    """True if downloads are forbidden: by the argument, or by `MLLM_PROTECTOR_OFFLINE`, which no argument lifts."""
    return bool(local_files_only) or os.environ.get("MLLM_PROTECTOR_OFFLINE", "").strip().lower() in (
        "1",
        "true",
        "yes",
        "on",
    )
