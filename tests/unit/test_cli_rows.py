import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mllm_protector_guard import DEFAULT_REFUSAL
from mllm_protector_guard.cli.main import app

DETECTOR = ("--detector", "unit.cli_fakes:detector")
DETOXIFIER = ("--detoxifier", "unit.cli_fakes:detoxifier")
SECRET = "a-private-text"


def run(*args: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def rows_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        lines(
            {"id": 7, "question": "How?", "answer": "Build a bomb.", "extra": {"lang": "en", "n": [1, 2.5, None]}},
            {"question": None, "answer": "Bake bread. \ud800 \x00 你好"},
            {"answer": " \n"},
        )
    )
    return path


def test_score_adds_the_score_and_keeps_order_and_fields(source: Path) -> None:
    result = run("score", source, *DETECTOR)
    assert result.exit_code == 0
    assert rows_of(result) == [
        {
            "id": 7,
            "question": "How?",
            "answer": "Build a bomb.",
            "extra": {"lang": "en", "n": [1, 2.5, None]},
            "harm_score": 0.99,
            "harmful": True,
        },
        {"question": None, "answer": "Bake bread. \ud800 \x00 你好", "harm_score": 0.01, "harmful": False},
        {"answer": " \n", "harm_score": None, "harmful": None},
    ]


def test_the_threshold_is_the_detectors_own_or_the_one_given(source: Path) -> None:
    own = rows_of(run("score", source, "--detector", "unit.cli_fakes:strict_detector"))
    given = rows_of(run("score", source, *DETECTOR, "--threshold", "0.995"))
    assert [row["harmful"] for row in own] == [True, True, None]
    assert [row["harmful"] for row in given] == [False, False, None]


@pytest.mark.parametrize("size", ["1", "2", "100"])
def test_the_batch_size_changes_nothing_in_the_rows(tmp_path: Path, size: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines(*({"n": n, "answer": "bomb" if n % 3 else "bread"} for n in range(7))))
    rows = rows_of(run("score", path, *DETECTOR, "--batch-size", size))
    assert [row["n"] for row in rows] == list(range(7))
    assert [row["harmful"] for row in rows] == [bool(n % 3) for n in range(7)]


def test_standard_input_is_read_by_default_and_for_a_dash(source: Path) -> None:
    from_file = run("score", source, *DETECTOR).stdout
    assert run("score", *DETECTOR, stdin=source.read_bytes()).stdout == from_file
    assert run("score", "-", *DETECTOR, stdin=source.read_bytes()).stdout == from_file
    assert run("score", "-", *DETECTOR, stdin=gzip.compress(source.read_bytes())).stdout == from_file


def test_a_gzipped_file_gives_the_same_rows(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    assert run("score", packed, *DETECTOR).stdout == run("score", source, *DETECTOR).stdout


def test_an_empty_input_gives_an_empty_output(tmp_path: Path) -> None:
    result = run("score", *DETECTOR, stdin=b"")
    assert (result.exit_code, result.stdout) == (0, "")


def test_a_file_gets_the_rows_that_standard_output_would(source: Path, tmp_path: Path) -> None:
    result = run("score", source, *DETECTOR, "-o", tmp_path / "out.jsonl")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "out.jsonl").read_bytes().decode() == run("score", source, *DETECTOR).stdout


MALFORMED = {
    "not json": b"{",
    "no object": lines([SECRET]),
    "no answer": lines({"question": SECRET}),
    "answer not a string": lines({"question": "q", "answer": {SECRET: SECRET}}),
    "answer null": lines({"question": SECRET, "answer": None}),
    "question not a string": lines({"question": [SECRET], "answer": "a"}),
    "not utf-8": b'{"answer": "' + SECRET.encode() + b'\xff"}',
}


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("by_pipe", [False, True], ids=["file", "stdin"])
def test_a_malformed_line_is_reported_and_the_rest_goes_on(tmp_path: Path, bad: bytes, by_pipe: bool) -> None:
    content = lines({"answer": "one"}) + bad.rstrip(b"\n") + b"\n" + lines({"answer": "a bomb"})
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    result = run("score", *DETECTOR, stdin=content) if by_pipe else run("score", path, *DETECTOR)
    assert result.exit_code == 1
    assert [row["answer"] for row in rows_of(result)] == ["one", "a bomb"]
    assert f"{'standard input' if by_pipe else path}:2: " in result.stderr
    assert "1 malformed" in result.stderr
    assert SECRET not in result.stderr


def test_a_cut_gzip_file_gives_its_rows_and_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(lines(*({"answer": str(n * 7919)} for n in range(20_000))))[:-2000])
    result = run("score", path, *DETECTOR)
    assert result.exit_code == 1
    assert len(rows_of(result)) > 1000
    assert "cut off or damaged" in result.stderr


def test_a_field_named_as_a_result_gives_way_with_one_warning() -> None:
    content = lines({"answer": "bomb", "harmful": "mine"}, {"answer": "x", "harmful": 2, "error": "old"})
    result = run("score", *DETECTOR, stdin=content)
    assert result.exit_code == 0
    assert rows_of(result) == [
        {"answer": "bomb", "harm_score": 0.99, "harmful": True},
        {"answer": "x", "harm_score": 0.01, "harmful": False},
    ]
    assert result.stderr.count("'harmful' of the input is replaced") == 1
    assert result.stderr.count("'error' of the input is replaced") == 1


def test_a_row_that_cannot_be_scored_says_so_and_its_neighbours_do_not_suffer() -> None:
    content = lines({"answer": "bomb"}, {"answer": f"crash {SECRET}"}, {"answer": "bread"})
    result = run("score", "--detector", "unit.cli_fakes:Shaky", stdin=content)
    assert result.exit_code == 1
    first, failed, last = rows_of(result)  # nothing that the detector printed is among them
    assert (first["harmful"], last["harmful"]) == (True, False)
    assert {name: failed[name] for name in ("harm_score", "harmful", "error")} == {
        "harm_score": None,
        "harmful": None,
        "error": "DetectorError",
    }
    assert "line 2: DetectorError: Shaky failed with RuntimeError" in result.stderr
    assert "1 failed" in result.stderr
    assert SECRET not in result.stderr
    assert "a stray line" in result.stderr


def test_rewrite_adds_the_text() -> None:
    content = lines({"id": 1, "question": "q", "answer": "a bomb"}, {"id": 2, "answer": "b"})
    result = run("rewrite", "--detoxifier", "unit.cli_fakes:ShakyDetoxifier", stdin=content)
    assert result.exit_code == 0
    assert rows_of(result) == [
        {"id": 1, "question": "q", "answer": "a bomb", "text": "nicer than a bomb"},
        {"id": 2, "answer": "b", "text": "nicer than b"},
    ]


def test_rewrite_says_where_no_text_could_be_written() -> None:
    blank = run("rewrite", "--detoxifier", "unit.cli_fakes:silent_detoxifier", stdin=lines({"answer": "a"}))
    assert (blank.exit_code, rows_of(blank)) == (1, [{"answer": "a", "text": None, "error": "DetoxifierError"}])
    content = lines({"answer": "a"}, {"answer": "crash"})
    failed = run("rewrite", "--detoxifier", "unit.cli_fakes:ShakyDetoxifier", stdin=content)
    assert failed.exit_code == 1
    assert [row["text"] for row in rows_of(failed)] == ["nicer than a", None]
    assert "line 2: DetoxifierError: ShakyDetoxifier failed with RuntimeError" in failed.stderr


def test_check_gives_the_verdict(source: Path) -> None:
    result = run("check", source, *DETECTOR, *DETOXIFIER)
    assert result.exit_code == 0
    verdicts = [
        {name: row[name] for name in ("outcome", "reason", "text", "harm_score", "rewrite_score", "attempts")}
        for row in rows_of(result)
    ]
    assert verdicts == [
        {
            "outcome": "detoxified",
            "reason": "rewritten",
            "text": "Let us garden.",
            "harm_score": 0.99,
            "rewrite_score": 0.01,
            "attempts": 2,
        },
        {
            "outcome": "passed",
            "reason": "harmless",
            "text": "Bake bread. \ud800 \x00 你好",
            "harm_score": 0.01,
            "rewrite_score": None,
            "attempts": 0,
        },
        {
            "outcome": "passed",
            "reason": "blank",
            "text": " \n",
            "harm_score": None,
            "rewrite_score": None,
            "attempts": 0,
        },
    ]
    assert rows_of(result)[0]["id"] == 7


def test_check_follows_the_policy_options(source: Path) -> None:
    def first(*args: str) -> dict[str, Any]:
        return rows_of(run("check", source, *DETECTOR, *args))[0]

    assert first("--on-harm", "flag")["text"] == "Build a bomb."
    assert first("--on-harm", "flag")["outcome"] == "flagged"
    assert first("--on-harm", "withhold")["text"] == DEFAULT_REFUSAL
    assert first("--on-harm", "withhold", "--refusal", "No.")["text"] == "No."
    assert first(*DETOXIFIER, "--max-attempts", "1")["outcome"] == "withheld"
    assert first("--on-harm", "withhold", "--threshold", "0.995")["outcome"] == "passed"


def test_check_that_raises_marks_the_row_and_exits_1(source: Path) -> None:
    result = run("check", source, *DETECTOR, "--on-harm", "raise")
    assert result.exit_code == 1
    harmful, *others = rows_of(result)
    assert (harmful["outcome"], harmful["text"], harmful["error"]) == (
        "withheld",
        DEFAULT_REFUSAL,
        "HarmfulAnswerError",
    )
    assert all("error" not in row for row in others)


def test_check_on_error(tmp_path: Path) -> None:
    content = lines({"answer": "crash"}, {"answer": "bread"})

    def first(on_error: str) -> dict[str, Any]:
        shaky = ("--detector", "unit.cli_fakes:Shaky", "--on-harm", "withhold")
        result = run("check", *shaky, "--on-error", on_error, stdin=content)
        assert result.exit_code == 1
        row, other = rows_of(result)
        assert other["outcome"] == "passed"
        return row

    assert first("withhold")["text"] == DEFAULT_REFUSAL
    assert first("pass")["text"] == "crash"
    assert first("raise")["text"] is None
    assert {first(value)["error"] for value in ("withhold", "pass", "raise")} == {"DetectorError"}


def test_check_keeps_records_without_and_with_content(source: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    assert run("check", source, *DETECTOR, *DETOXIFIER, "--trace", trace).exit_code == 0
    records = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [record["outcome"] for record in records] == ["detoxified", "passed", "passed"]
    assert [record["tags"]["line"] for record in records] == ["1", "2", "3"]
    assert {record["integration"] for record in records} == {"cli"}
    assert "bomb" not in trace.read_text()

    trace.unlink()
    assert run("check", source, *DETECTOR, *DETOXIFIER, "--trace", trace, "--trace-content").exit_code == 0
    assert "Build a bomb." in trace.read_text()


@pytest.mark.parametrize(
    "args",
    [
        ("score", "missing.jsonl", *DETECTOR),
        ("score", ".", *DETECTOR),
        ("score", *DETECTOR, "--threshold", "2"),
        ("score", *DETECTOR, "--threshold", "nan"),
        ("score", *DETECTOR, "--batch-size", "0"),
        ("score", "--detector", "no_such_module:detector"),
        ("score", "--detector", "unit.cli_fakes:no_such_name"),
        ("score", "--detector", "unit.cli_fakes:nothing"),
        ("score", "--detector", "unit.cli_fakes:broken"),
        ("score", "--detector", "unit.cli_fakes:detoxifier"),
        ("score", *DETECTOR, "--resume"),
        ("score", *DETECTOR, "--force"),
        ("score", *DETECTOR, "-o", "out.jsonl.gz"),
        ("score", *DETECTOR, "-o", "."),
        ("check", *DETECTOR, *DETOXIFIER, "--on-harm", "explode"),
        ("check", *DETECTOR, *DETOXIFIER, "--timeout", "0"),
        ("check", *DETECTOR, *DETOXIFIER, "--refusal", ""),
        ("check", *DETECTOR, *DETOXIFIER, "--max-attempts", "0"),
        ("check", *DETECTOR, *DETOXIFIER, "--trace-content"),
        ("rewrite", "--detoxifier", "unit.cli_fakes:detector"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_with_a_message(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args, stdin=lines({"answer": "a"}))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.strip()
    assert "Traceback" not in result.stderr


def test_a_detector_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_models.py").write_text(
        "class Zoo:\n    class Always:\n        def score(self, turns):\n            return [0.7] * len(turns)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("unused")  # restores sys.path afterwards
    result = run("score", "--detector", "my_own_models:Zoo.Always", stdin=lines({"answer": "a"}))
    assert [row["harm_score"] for row in rows_of(result)] == [0.7]
