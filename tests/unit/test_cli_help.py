import re

import pytest
import typer
from typer.testing import CliRunner

from mllm_protector_guard import __version__
from mllm_protector_guard.cli.main import app


def commands(group: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, (*path, name))
    return found


ALL = commands(typer.main.get_command(app))


def test_every_command_of_the_tool_is_there() -> None:
    assert {"pull", "score", "rewrite", "check", "evaluate", "train"} <= {path[0] for path in ALL if path}
    assert {("train", "detector"), ("train", "detoxifier")} <= set(ALL)


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_help_exits_0_and_explains_every_option(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    assert command.help
    for parameter in command.params:
        assert parameter.help, parameter.name
        if parameter.opts[0].startswith("--"):
            assert re.search(rf"(?m){re.escape(parameter.opts[0])}\b", result.stdout), parameter.name


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"mllm-protector {__version__}\n")


def test_without_a_command_the_help_is_shown() -> None:
    assert "score" in CliRunner().invoke(app, []).output
