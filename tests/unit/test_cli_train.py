import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mllm_protector_guard.cli import train
from mllm_protector_guard.cli.main import app
from mllm_protector_guard.models import catalog
from mllm_protector_guard.training.config import load_recipe


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, args)])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a", "harmful": True}) + "\n")
    return path


def test_an_unknown_recipe_is_named(rows: Path, tmp_path: Path) -> None:
    result = run("detector", "--recipe", "no-such-recipe", "--train", rows, "--dev", rows, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no-such-recipe" in result.stderr


def test_a_recipe_of_the_other_kind_is_refused(rows: Path, tmp_path: Path) -> None:
    wrong = ("--recipe", "smollm2-135m-detoxifier", "--train", rows, "--dev", rows, "-o", tmp_path / "out")
    result = run("detector", *wrong)
    assert result.exit_code == 2
    assert "is for a detoxifier" in result.stderr
    result = run("detoxifier", "--recipe", "smollm2-135m-detector", "--train", rows, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "is for a detector" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [train.detector, train.detoxifier])
def test_the_default_recipe_starts_from_nothing_that_is_not_there(command: Callable[..., None]) -> None:
    recipe = load_recipe(inspect.signature(command).parameters["recipe"].default)
    assert recipe.start_from is None or recipe.start_from in catalog.names()


@pytest.mark.parametrize("command", [train.detector, train.detoxifier])
def test_the_default_recipe_takes_rows_of_any_source(command: Callable[..., None]) -> None:
    recipe = load_recipe(inspect.signature(command).parameters["recipe"].default)
    assert (recipe.sources, recipe.other_sources.rows, recipe.licences) == ({}, None, None)
    assert getattr(recipe, "metric_sources", ()) == ()


def test_a_wrong_override_is_refused(rows: Path, tmp_path: Path) -> None:
    result = run("detector", "--train", rows, "--dev", rows, "-o", tmp_path / "out", "--set", "no_such_field=1")
    assert result.exit_code == 2
    assert "no_such_field" in result.stderr


def test_a_wrong_row_is_told_by_file_and_line(tmp_path: Path, rows: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a-private-text", "harmful": true}\n')
    result = run("detector", "--train", bad, "--dev", rows, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert f"{bad}:1: " in result.stderr
    assert "a-private-text" not in result.stderr


@pytest.mark.parametrize("missing", ["--train", "--dev", "-o"])
def test_files_and_folder_must_be_given(rows: Path, tmp_path: Path, missing: str) -> None:
    given = {"--train": rows, "--dev": rows, "-o": tmp_path / "out"}
    given.pop(missing)
    assert run("detector", *(part for pair in given.items() for part in pair)).exit_code == 2
