"""What the commands tell people: messages, progress and exit codes. All of it goes to standard error."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mllm_protector_guard.errors import CheckpointError, ConfigError, GuardError, MissingDependencyError

__all__ = ["EXIT_FINDING", "EXIT_USAGE", "Messages", "exit_codes", "report_console"]

EXIT_FINDING = 1
"""The command ran; a row failed, or what was asked about was found."""
EXIT_USAGE = 2
"""The command could not run: wrong usage, a setting, a missing model or package."""
_EXIT_INTERRUPTED = 130


class Messages:
    """Standard error: one-line messages, and a progress bar where a person looks on.

    Args:
        show_progress: False leaves the bar out even on a terminal.
    """

    def __init__(self, *, show_progress: bool = True) -> None:
        self._console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rows]:,} rows"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (show_progress and self._console.is_terminal),
            transient=True,
        )

    def say(self, message: str) -> None:
        """Writes one line; above the bar when there is one."""
        self._console.print(f"mllm-protector: {message}", markup=False, soft_wrap=True)


def report_console(width: int = 120) -> Console:
    """Standard output for tables; a file or pipe has no width of its own, and a narrow one would fold them.

    Args:
        width: Characters of a line where there is no terminal.
    """
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns the errors that a user can mend into a message and an exit code.

    Raises:
        typer.Exit: In the place of such an error.
    """
    try:
        yield
    except KeyboardInterrupt:
        Messages().say("stopped")
        raise typer.Exit(_EXIT_INTERRUPTED) from None
    except (ConfigError, CheckpointError, MissingDependencyError) as error:
        Messages().say(f"error: {error}")
        raise typer.Exit(EXIT_USAGE) from error
    except GuardError as error:
        Messages().say(f"error: {error}")
        raise typer.Exit(EXIT_FINDING) from error
    except OSError as error:
        if error.errno == errno.EPIPE:
            _forget_stdout()
        else:
            Messages().say(f"error: {error}")
        raise typer.Exit(EXIT_FINDING) from error


def _forget_stdout() -> None:
    """Nobody reads standard output any more: what is still in its buffer must not raise at the end of the process."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    except OSError:
        return
