import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mllm_protector_guard.cli.main import app

REPOSITORY = Path(__file__).parents[2]
DETECTOR = ("--detector", "unit.cli_fakes:detector")
SECRET = "a-private-text"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, args)])


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    return write(
        tmp_path / "mixed.jsonl",
        {"question": "q", "answer": "bomb", "harmful": True, "source": "s"},
        {"question": "q", "answer": "other", "harmful": True},
        {"question": None, "answer": "bread", "harmful": False},
        {"answer": "milk", "harmful": False},
    )


@pytest.fixture
def harmless(tmp_path: Path) -> Path:
    return write(tmp_path / "harmless.jsonl", *({"answer": f"milk {n}", "harmful": False} for n in range(9)))


def report(*args: str | Path) -> dict[str, Any]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout, parse_constant=no_constant)  # type: ignore[no-any-return]


def test_json_has_each_file_and_the_mean(mixed: Path, harmless: Path) -> None:
    both = report(mixed, harmless, *DETECTOR)
    first, second = both["files"]
    assert (first["name"], first["rows"], first["harmful"], first["threshold"]) == ("mixed", 4, 2, 0.5)
    assert (first["precision"], first["recall"], first["auroc"], first["fpr"]) == (1.0, 0.5, 0.75, 0.0)
    assert first["intervals"]["recall"][0] < 0.5 < first["intervals"]["recall"][1]
    assert [second[rate] for rate in ("precision", "recall", "f1", "auroc")] == [None] * 4
    assert second["fpr"] == 0.0
    assert both["mean"]["f1"] == first["f1"]
    assert both["mean"]["fpr"] == 0.0


def test_the_table_shows_every_rate(mixed: Path, harmless: Path) -> None:
    result = run(mixed, harmless, *DETECTOR)
    assert result.exit_code == 0
    for text in ("precision", "recall", "F1", "AUROC", "FPR", "mixed", "harmless", "mean of files", "0.667", "0.750"):
        assert text in result.stdout
    assert "nan" not in result.stdout.lower()


def test_the_report_is_written_to_a_file_too(mixed: Path, tmp_path: Path) -> None:
    assert run(mixed, *DETECTOR, "-o", tmp_path / "report.json").exit_code == 0
    assert json.loads((tmp_path / "report.json").read_text())["files"][0]["recall"] == 0.5


def test_the_threshold_can_be_given(mixed: Path) -> None:
    assert report(mixed, *DETECTOR, "--threshold", "0.001")["files"][0]["fpr"] == 1.0


def test_unlabelled_malformed_and_failed_rows_are_told_apart(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"answer": "bomb", "harmful": True},
        {"answer": "x", "harmful": None},
        {"answer": "crash", "harmful": False},
        {"question": SECRET, "harmful": True},
        {"answer": "bread", "harmful": False},
    )
    result = run(path, "--detector", "unit.cli_fakes:Shaky", "--json")
    assert result.exit_code == 1
    counts = json.loads(result.stdout)["files"][0]
    assert {name: counts[name] for name in ("rows", "unlabelled", "failed", "malformed", "harmful", "harmless")} == {
        "rows": 4,
        "unlabelled": 1,
        "failed": 1,
        "malformed": 1,
        "harmful": 1,
        "harmless": 1,
    }
    assert f"{path}:4: " in result.stderr
    assert SECRET not in result.stderr


def test_a_file_without_labels_is_a_finding(tmp_path: Path) -> None:
    result = run(write(tmp_path / "a.jsonl", {"answer": "a"}), *DETECTOR, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["files"][0]["unlabelled"] == 1
    assert "0 of 1 rows measured" in result.stderr


def test_files_of_the_same_name_are_told_apart(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = write(tmp_path / "other" / "mixed.jsonl", {"answer": "a", "harmful": False})
    assert [one["name"] for one in report(mixed, twin, *DETECTOR)["files"]] == [str(mixed), str(twin)]


def test_wrong_usage_is_exit_code_2(mixed: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "missing.jsonl", *DETECTOR).exit_code == 2
    assert run(*DETECTOR).exit_code == 2
    assert run(mixed, *DETECTOR, "--threshold", "-1").exit_code == 2
    assert run(mixed, *DETECTOR, "--scores", mixed).exit_code == 2
    assert run(mixed, "--detector", "unit.cli_fakes:broken").exit_code == 2


def slow(*args: str | Path, calls: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mllm_protector_guard.cli", "evaluate", *map(str, args)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
            "CLI_FAKES_CALLS": str(calls),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_evaluation_goes_on_from_its_scores(tmp_path: Path, harmless: Path) -> None:
    data = write(
        tmp_path / "data.jsonl",
        *({"answer": f"bomb {n}" if n % 2 else f"bread {n}", "harmful": n % 3 == 0} for n in range(60)),
    )
    scores, calls = tmp_path / "scores.jsonl", tmp_path / "calls"
    command = (data, "--detector", "unit.cli_fakes:Slow", "--batch-size", "1", "--scores", scores, "--json")
    process = slow(*command, calls=calls)
    for _ in range(600):
        if scores.exists() and scores.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    scores.write_bytes(scores.read_bytes() + b'{"half a r')
    done = scores.read_bytes().count(b"\n")
    assert 5 <= done < 60
    assert b"bomb" not in scores.read_bytes()
    calls.unlink()

    process = slow(*command, calls=calls)
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 0, messages
    assert sum(map(int, calls.read_text().split())) == 60 - done
    assert json.loads(output)["files"] == report(data, *DETECTOR)["files"]

    calls.unlink()  # another order, another threshold and one more file: only the new rows are scored
    process = slow(harmless, *command, "--threshold", "0.995", calls=calls)
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 0, messages
    assert sum(map(int, calls.read_text().split())) == 9
    assert [one["recall"] for one in json.loads(output)["files"]] == [None, 0.0]


def test_scores_of_another_detector_or_another_kind_are_refused(mixed: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.jsonl"
    assert run(mixed, *DETECTOR, "--scores", scores).exit_code == 0
    result = run(mixed, "--detector", "unit.cli_fakes:strict_detector", "--scores", scores)
    assert result.exit_code == 2
    assert "begun with other settings: detector" in result.stderr
    rows = tmp_path / "rows.jsonl"
    assert CliRunner().invoke(app, ["score", str(mixed), *DETECTOR, "-o", str(rows)]).exit_code == 0
    assert run(mixed, *DETECTOR, "--scores", rows).exit_code == 2
    changed = write(mixed, {"answer": "changed", "harmful": False})
    assert report(changed, *DETECTOR, "--scores", scores)["files"][0]["rows"] == 1
