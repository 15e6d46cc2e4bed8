"""Every error the guard raises.

```
GuardError
├─ ConfigError (ValueError)            a setting that cannot work
├─ MissingDependencyError (ImportError)  .extra
├─ CheckpointError                     .source   missing, wrong sha256, wrong base, fresh head
├─ DataError (ValueError)              .path .line
├─ InferenceError                      a model failed while it ran
│  ├─ DetectorError
│  │  └─ DetectorBusyError               too many calls wait for it
│  ├─ DetoxifierError
│  └─ CheckTimeoutError (TimeoutError) the policy's time limit ran out
└─ HarmfulAnswerError                  .result   only with on_harm="raise"
```

A message says what was wrong and how to mend it. It never holds a text of a user or a model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_protector_guard.types import GuardResult

__all__ = [
    "CheckTimeoutError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DetectorBusyError",
    "DetectorError",
    "DetoxifierError",
    "GuardError",
    "HarmfulAnswerError",
    "InferenceError",
    "MissingDependencyError",
]


class GuardError(Exception):
    """Base of all errors of this package."""


class ConfigError(GuardError, ValueError):
    """A setting is wrong or settings contradict each other."""


class MissingDependencyError(GuardError, ImportError):
    """An optional package is not installed.

    Attributes:
        extra: The extra of `mllm-protector-guard` that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f'{package!r} is not installed. Run: pip install "mllm-protector-guard[{extra}]"', name=package
        )
        self.extra = extra

    # The three __reduce__ let errors travel between processes although their arguments are not their message.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.extra)


class CheckpointError(GuardError):
    """A model cannot be loaded as it is.

    Attributes:
        source: Name, path or hub id of the checkpoint.
    """

    def __init__(self, message: str, *, source: str | Path) -> None:
        super().__init__(message)
        self.source = str(source)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), source=self.source), self.args


class DataError(GuardError, ValueError):
    """A file of questions and answers has a row that cannot be used.

    Attributes:
        path: The file, or None for standard input.
        line: 1-based line number, or None when the whole file is meant.
    """

    def __init__(self, message: str, *, path: str | Path | None = None, line: int | None = None) -> None:
        where = ":".join(str(part) for part in (path, line) if part is not None)
        super().__init__(f"{where}: {message}" if where else message)
        self.path = None if path is None else str(path)
        self.line = line


class InferenceError(GuardError):
    """A model failed while it judged or wrote."""


class DetectorError(InferenceError):
    """The harm detector failed or gave no usable score."""


class DetectorBusyError(DetectorError):
    """So many calls wait for the detector that another one was refused at once."""


class DetoxifierError(InferenceError):
    """The response detoxifier failed or gave no usable text."""


class CheckTimeoutError(InferenceError, TimeoutError):
    """A check took longer than `GuardPolicy.timeout_s`."""


class HarmfulAnswerError(GuardError):
    """An answer was judged harmful under `on_harm="raise"`.

    Attributes:
        result: The verdict; its text is the refusal.
    """

    def __init__(self, result: GuardResult) -> None:
        score = "none" if result.harm_score is None else f"{result.harm_score:.4f}"
        super().__init__(
            f"the answer was judged harmful (harm_score {score}, threshold {result.threshold:.4f}, "
            f"check {result.id}). Catch HarmfulAnswerError, or set on_harm to 'detoxify', 'withhold' or 'flag'."
        )
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.result,)
