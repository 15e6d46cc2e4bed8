"""Where `mllm-protector evaluate` writes its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_protector_guard.cli.console import report_console
from mllm_protector_guard.errors import ConfigError

if TYPE_CHECKING:
    from mllm_protector_guard.evaluation.report_json import Report

__all__ = ["ReportTargets"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTargets:
    """Where the report goes.

    Attributes:
        as_json: Whether standard output gets JSON, not tables.
        output: File for JSON.
        markdown: File for Markdown.
        html: File for the page.
        slices: Whether the tables hold the parts of the rows.
    """

    as_json: bool
    output: Path | None
    markdown: Path | None
    html: Path | None
    slices: bool

    def require_apart_from(self, inputs: Sequence[Path]) -> None:
        """Refuses to write over what is read, or two forms of the report into one file, before hours of scoring.

        Raises:
            ConfigError: A file cannot be written or is an input, or two are the same.
        """
        written = [path for path in (self.output, self.markdown, self.html) if path is not None]
        for path in written:
            if any(path.exists() and path.samefile(one) for one in inputs):
                raise ConfigError(f"{str(path)!r} is an input; write the report to another file")
            if not path.resolve().parent.is_dir() or path.is_dir():
                raise ConfigError(f"{str(path)!r} cannot be written; name a file in a folder that is there")
        if len({path.resolve() for path in written}) < len(written):
            raise ConfigError("--output, --markdown and --html name the same file; give each its own")

    def write(self, report: Report) -> None:
        """Writes every form that was asked for."""
        from mllm_protector_guard.evaluation.report_html import to_html
        from mllm_protector_guard.evaluation.report_json import write_json
        from mllm_protector_guard.evaluation.report_markdown import to_markdown
        from mllm_protector_guard.evaluation.report_terminal import to_terminal

        for path, make in ((self.output, write_json), (self.markdown, to_markdown), (self.html, to_html)):
            if path is not None:
                path.write_text(make(report).rstrip("\n") + "\n", encoding="utf-8")
        if self.as_json:
            print(write_json(report))
            return
        console = report_console(140)
        for table in to_terminal(report, slices=self.slices):
            console.print(table)
