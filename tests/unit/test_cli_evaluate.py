import json
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mllm_protector_guard.cli.main import app
from unit.cli_processes import start, wait_for_lines

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


def test_a_killed_evaluation_goes_on_from_its_scores(tmp_path: Path, harmless: Path) -> None:
    data = write(
        tmp_path / "data.jsonl",
        *({"answer": f"bomb {n}" if n % 2 else f"bread {n}", "harmful": n % 3 == 0} for n in range(60)),
    )
    scores, calls = tmp_path / "scores.jsonl", tmp_path / "calls"
    command = (data, "--detector", "unit.cli_fakes:Slow", "--batch-size", "1", "--latency-sample", "0")
    command = (*command, "--scores", scores, "--json")
    process = start("evaluate", *command, calls=calls, text=True)
    wait_for_lines(scores, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    scores.write_bytes(scores.read_bytes() + b'{"half a r')
    done = scores.read_bytes().count(b"\n")
    assert 5 <= done < 60
    assert b"bomb" not in scores.read_bytes()
    calls.unlink()

    process = start("evaluate", *command, calls=calls, text=True)
    output, messages = process.communicate(timeout=200)
    assert process.returncode == 0, messages
    assert sum(map(int, calls.read_text().split())) == 60 - done
    assert json.loads(output)["files"] == report(data, *DETECTOR)["files"]

    calls.unlink()  # another order, another threshold and one more file: only the new rows are scored
    process = start("evaluate", harmless, *command, "--threshold", "0.995", calls=calls, text=True)
    output, messages = process.communicate(timeout=200)
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


def test_detectors_are_measured_side_by_side(mixed: Path, harmless: Path) -> None:
    both = (
        "--detector",
        "unit.cli_fakes:detector,name=loose",
        "--detector",
        "unit.cli_fakes:strict_detector,threshold=0.02",
    )
    models = report(mixed, harmless, *both)["models"]
    assert [one["name"] for one in models] == ["loose", "unit.cli_fakes:strict_detector"]
    assert [one["threshold"] for one in models] == [0.5, 0.02]
    assert [[one["name"] for one in model["files"]] for model in models] == [["mixed", "harmless"]] * 2
    result = run(mixed, harmless, *both)
    assert "Models side by side" in result.stdout
    assert result.stdout.count("loose") >= 3


def test_a_setting_of_one_detector_goes_before_that_of_all(mixed: Path) -> None:
    models = report(
        mixed, *DETECTOR, "--detector", "unit.cli_fakes:strict_detector,threshold=0.3", "--threshold", "0.2"
    )
    assert [one["threshold"] for one in models["models"]] == [0.2, 0.3]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("unit.cli_fakes:detector,colour=red", "colour=red"),
        ("unit.cli_fakes:detector,polarity=good", "polarity is harmful or harmless"),
        ("unit.cli_fakes:detector,threshold=2", "threshold=2"),
        ("unit.cli_fakes:detector,threshold=", "threshold="),
        ("unit.cli_fakes:detector,name=a,name=b", "name=b"),
    ],
)
def test_a_wrong_setting_of_a_detector_is_named(mixed: Path, spec: str, said: str) -> None:
    result = run(mixed, "--detector", spec)
    assert result.exit_code == 2
    assert said in result.stderr


def test_detectors_that_look_the_same_must_be_told_apart(mixed: Path) -> None:
    result = run(mixed, *DETECTOR, *DETECTOR)
    assert result.exit_code == 2
    assert "name=" in result.stderr


def test_each_detector_keeps_its_scores_in_the_folder(mixed: Path, tmp_path: Path) -> None:
    both = (*DETECTOR, "--detector", "unit.cli_fakes:strict_detector,name=strict")
    kept = tmp_path / "scores"
    first = report(mixed, *both, "--scores", kept)
    assert len(list(kept.glob("*.jsonl"))) == 2
    assert (kept / "strict.jsonl").read_text().count("\n") == 4
    again = report(mixed, *both, "--scores", kept)
    assert [one["latency"] for one in again["models"]] == [None, None]  # nothing was scored, so nothing was timed
    assert [one["files"] for one in again["models"]] == [one["files"] for one in first["models"]]
    assert report(mixed, *DETECTOR, "--scores", kept)["files"] == first["files"]  # one of them alone goes on as well
    assert run(mixed, *both, "--scores", kept / "strict.jsonl").exit_code == 2


def test_a_turn_that_comes_twice_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("CLI_FAKES_CALLS", str(calls))
    path = write(tmp_path / "a.jsonl", *[{"answer": "bomb", "harmful": True}] * 5, {"answer": "a", "harmful": False})
    slow_detector = ("--detector", "unit.cli_fakes:Slow", "--latency-sample", "0")
    assert report(path, *slow_detector, "--batch-size", "2")["files"][0]["harmful"] == 5
    assert sum(map(int, calls.read_text().split())) == 2


def test_times_are_told_with_the_sample_of_single_answers(mixed: Path) -> None:
    latency = report(mixed, *DETECTOR, "--latency-sample", "3")["models"][0]["latency"]
    assert (latency["answers"], latency["single_answers"], latency["batch_size"]) == (4, 3, 32)
    assert latency["single_p50_ms"] <= latency["single_p95_ms"]
    assert latency["device"]
    assert report(mixed, *DETECTOR, "--latency-sample", "0")["models"][0]["latency"]["single_p50_ms"] is None


def test_answers_under_attack_are_measured_beside_the_clean_ones(mixed: Path) -> None:
    file = report(mixed, *DETECTOR, "--perturb", "fullwidth", "--perturb", "zero-width")["models"][0]["files"][0]
    assert [one["kind"] for one in file["perturbed"]] == ["zero-width", "fullwidth"]
    assert [one["clean"]["auroc"] for one in file["perturbed"]] == [0.75, 0.75]
    assert [one["auroc_drop"] for one in file["perturbed"]] == [0.25, 0.25]
    everything = report(mixed, *DETECTOR, "--perturb", "all", "--attack-rows", "1")["models"][0]["files"][0]
    assert len(everything["perturbed"]) == 6
    assert {one["clean"]["true_negatives"] for one in everything["perturbed"]} == {1}


def test_harm_is_looked_for_in_long_answers(mixed: Path, harmless: Path, tmp_path: Path) -> None:
    files = report(mixed, harmless, *DETECTOR, "--bury", "20")["models"][0]["files"]
    assert (files[0]["buried"]["recall"], files[0]["buried"]["fpr"], files[0]["buried"]["words"]) == (0.5, 0.0, 20)
    assert files[1]["buried"] is None
    filler = tmp_path / "filler.txt"
    filler.write_text("A bomb of a film.\n\nAnother bomb.")
    file = report(mixed, *DETECTOR, "--bury", "20", "--filler", filler)["models"][0]["files"][0]
    assert file["buried"]["fpr"] == 1.0


def test_pages_are_written_where_asked(mixed: Path, harmless: Path, tmp_path: Path) -> None:
    page, text = tmp_path / "report.html", tmp_path / "report.md"
    assert run(mixed, harmless, *DETECTOR, "--html", page, "--markdown", text).exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "| mixed | 4 | 2 |" in text.read_text(encoding="utf-8")


def test_parts_are_printed_when_asked_for(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"answer": "bomb", "harmful": True, "source": "left", "extra": {"lang": "en"}},
        {"answer": "rice", "harmful": False, "source": "right", "extra": {"lang": "zh"}},
    )
    assert "right" not in run(path, *DETECTOR).stdout
    shown = run(path, *DETECTOR, "--slices").stdout
    assert "by source" in shown
    assert "right" in shown
    assert "by language" in shown


@pytest.mark.parametrize(
    "wrong",
    [
        ("--perturb", "upside-down"),
        ("--filler", "{data}"),
        ("--bury", "0"),
        ("--html", "{data}"),
        ("--html", "{folder}/r", "--markdown", "{folder}/r"),
        ("--output", "{folder}/missing/r.json"),
        ("--output", "{folder}"),
    ],
    ids=" ".join,
)
def test_what_cannot_work_is_said_before_anything_is_scored(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CLI_FAKES_CALLS", str(tmp_path / "calls"))
    options = [part.format(data=mixed, folder=tmp_path) for part in wrong]
    before = mixed.read_bytes()
    assert run(mixed, "--detector", "unit.cli_fakes:Slow", *options).exit_code == 2
    assert not (tmp_path / "calls").exists()
    assert mixed.read_bytes() == before
