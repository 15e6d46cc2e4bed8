from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mllm_protector_guard.cli.main import app


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["pull", *map(str, args)])


@pytest.fixture(autouse=True)
def _empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_PROTECTOR_HOME", str(tmp_path / "home"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    result = run("no-such-model")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "smollm2-135m" in result.stderr


def test_a_file_with_other_bytes_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF no")
    result = run("--from", wrong)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert str(wrong) in result.stderr.replace("\n", "")


def test_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert run("--from", tmp_path / "a.gguf", "--source", "hub").exit_code == 2
    assert run("--from", tmp_path / "missing.gguf").exit_code == 2
    assert run("--source", "elsewhere").exit_code == 2
