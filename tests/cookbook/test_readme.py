"""What the README says is true: its Python runs, its commands and links exist."""

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from mllm_protector_guard.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?P<mark><!-- not run[^>]*-->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = list(BLOCK.finditer(README))
PYTHON = [block["code"] for block in BLOCKS if block["language"] == "python"]
RUN = [block["code"] for block in BLOCKS if block["language"] == "python" and not block["mark"]]
COMMANDS = [
    line for block in BLOCKS if block["language"] == "sh" for line in block["code"].splitlines() if line.strip()
]


@pytest.mark.slow
@pytest.mark.parametrize("code", RUN, ids=range(len(RUN)))
def test_python_runs_with_the_default_model(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_calls_what_exists(code):
    """Also of the blocks that are not run: imported names are there, and ours take these arguments."""
    tree = ast.parse(code)
    names: dict[str, Callable[..., object]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            found = {alias.name: getattr(module, alias.name) for alias in node.names}
            names.update(found if "mllm_protector" in str(node.module) else {})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            keywords = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(names[node.func.id]).bind(*([None] * len(node.args)), **keywords)


def test_first_example_is_short():
    assert len([line for line in RUN[0].splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("line", COMMANDS)
def test_command_exists(line):
    program, *words = shlex.split(line)
    if program == "mllm-protector":
        check_own_command(words)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        variables = [word.partition("=")[0] for word in words if "=" in word]
        assert all(re.search(rf"^{name} \?=", makefile, re.MULTILINE) for name in variables)
        targets = [word for word in words if "=" not in word]
        assert targets
        assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in targets)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extra in re.findall(r"\[(.+?)\]", line):
            assert extra in project["optional-dependencies"]
    else:
        assert line == "rm -rf .venv"


def check_own_command(words: list[str]) -> None:
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    given = [word for word in words if word.startswith("-")]
    assert set(given) <= options


def test_table_of_policies_is_the_policy():
    from mllm_protector_guard import GuardPolicy

    rows = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert set(rows) == set(GuardPolicy.model_fields)


def test_links_into_the_repository_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "cookbook" / "README.md"):
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
        assert targets
        assert all((page.parent / target).exists() for target in targets)
