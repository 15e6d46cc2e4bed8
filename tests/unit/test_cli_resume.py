import json
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mllm_protector_guard.cli.main import app
from unit.cli_processes import start, wait_for_lines

SCORE = ("score", "--detector", "unit.cli_fakes:detector")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [json.dumps({"n": n, "answer": "a bomb" if n % 3 == 0 else f"bread {n}"}) for n in range(100)]
    rows[10] = "malformed"
    rows[11] = ""
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def run(*args: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def whole(source: Path, tmp_path: Path) -> bytes:
    """What a run that nobody stops writes."""
    assert run(*SCORE, source, "-o", tmp_path / "whole.jsonl").exit_code == 1
    return (tmp_path / "whole.jsonl").read_bytes()


def test_a_killed_run_goes_on_where_it_was(source: Path, out: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    command = ("score", "--detector", "unit.cli_fakes:Slow", source, "-o", out, "--batch-size", "2")
    process = start(*command, calls=calls)
    wait_for_lines(out, 8)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = out.read_bytes().count(b"\n")
    assert 8 <= done < 98
    calls.unlink()

    process = start(*command, "--resume", calls=calls)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 1, messages  # the malformed line of the first part is still told
    assert b"in.jsonl:11: not valid JSON" in messages
    assert b"98 rows" in messages
    assert out.read_bytes() == whole(source, tmp_path)
    assert sum(map(int, calls.read_text().split())) == 98 - done  # nothing was scored twice


@pytest.mark.parametrize("kept", [0, 1, 17, 18, 19, 40])
@pytest.mark.parametrize("half", [b"", b'{"n": 4', b"\xe4\xbd"], ids=["clean", "half a row", "half a character"])
def test_wherever_a_run_was_cut_the_file_ends_up_the_same(
    source: Path, out: Path, tmp_path: Path, kept: int, half: bytes
) -> None:
    expected = whole(source, tmp_path)
    assert run(*SCORE, source, "-o", out).exit_code == 1
    out.write_bytes(b"".join(expected.splitlines(keepends=True)[:kept]) + half)
    assert run(*SCORE, source, "-o", out, "--resume").exit_code == 1
    assert out.read_bytes() == expected


def test_a_half_row_longer_than_a_read_block_is_cut_off(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "long.jsonl"
    source.write_text("".join(json.dumps({"n": n, "answer": "x" * 200_000}) + "\n" for n in range(3)))
    assert run(*SCORE, source, "-o", out).exit_code == 0
    expected = out.read_bytes()
    out.write_bytes(expected[:-70_000])
    assert run(*SCORE, source, "-o", out, "--resume").exit_code == 0
    assert out.read_bytes() == expected


def test_resume_of_a_complete_file_changes_nothing_and_loads_no_model(source: Path, out: Path, tmp_path: Path) -> None:
    process = start("score", "--detector", "unit.cli_fakes:Slow", source, "-o", out, calls=tmp_path / "calls")
    process.communicate(timeout=60)
    before = out.read_bytes()
    (tmp_path / "calls").unlink()
    process = start(
        "score", "--detector", "unit.cli_fakes:Slow", source, "-o", out, "--resume", calls=tmp_path / "calls"
    )
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.read_bytes() == before
    assert not (tmp_path / "calls").exists()


def test_resume_begins_a_file_that_is_not_there(source: Path, out: Path, tmp_path: Path) -> None:
    assert run(*SCORE, source, "-o", out, "--resume").exit_code == 1
    assert out.read_bytes() == whole(source, tmp_path)


def test_resume_takes_lines_that_came_to_the_end_of_the_input(source: Path, out: Path) -> None:
    run(*SCORE, source, "-o", out)
    with source.open("a") as file:
        file.write('{"n": 100, "answer": "new"}\n')
    run(*SCORE, source, "-o", out, "--resume")
    assert json.loads(out.read_text().splitlines()[-1]) == {
        "n": 100,
        "answer": "new",
        "harm_score": 0.01,
        "harmful": False,
    }


def test_resume_works_from_standard_input(source: Path, out: Path, tmp_path: Path) -> None:
    expected = whole(source, tmp_path)
    run(*SCORE, source, "-o", out)
    out.write_bytes(b"".join(expected.splitlines(keepends=True)[:20]))
    assert run(*SCORE, "-o", out, "--resume", stdin=source.read_bytes()).exit_code == 1
    assert out.read_bytes() == expected


def refused(result: Result, because: str) -> bool:
    return result.exit_code == 2 and because in result.stderr


def test_an_existing_file_is_only_overwritten_by_force(source: Path, out: Path, tmp_path: Path) -> None:
    out.write_text("precious\n")
    assert refused(run(*SCORE, source, "-o", out), "exists")
    assert out.read_text() == "precious\n"
    assert refused(run(*SCORE, source, "-o", out, "--resume"), "cannot be resumed")
    assert out.read_text() == "precious\n"
    assert refused(run(*SCORE, source, "-o", out, "--resume", "--force"), "give one of them")
    assert run(*SCORE, source, "-o", out, "--force").exit_code == 1
    assert out.read_bytes() == whole(source, tmp_path)


def test_resume_with_other_settings_is_refused(source: Path, out: Path) -> None:
    run(*SCORE, source, "-o", out)
    before = out.read_bytes()
    assert refused(run(*SCORE, source, "-o", out, "--resume", "--threshold", "0.7"), "threshold (None, now 0.7)")
    assert refused(run("score", "--detector", "unit.cli_fakes:Shaky", source, "-o", out, "--resume"), "detector (")
    assert refused(
        run("rewrite", "--detoxifier", "unit.cli_fakes:detoxifier", source, "-o", out, "--resume"), "command ('score'"
    )
    assert run(*SCORE, source, "-o", out, "--resume", "--batch-size", "3").exit_code == 1
    assert out.read_bytes() == before


def test_resume_with_another_input_is_refused(source: Path, out: Path) -> None:
    run(*SCORE, source, "-o", out)
    before = out.read_bytes()
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(lines[:50]))
    assert refused(run(*SCORE, source, "-o", out, "--resume"), "another input")
    source.write_text("".join([*lines[:30], '{"n": 30, "answer": "changed"}\n', *lines[31:]]))
    result = run(*SCORE, source, "-o", out, "--resume")
    assert refused(result, "row 29 of the output does not belong to line 31")
    assert "changed" not in result.stderr
    assert out.read_bytes() == before


def test_a_model_folder_whose_files_changed_is_another_setting(tmp_path: Path) -> None:
    from mllm_protector_guard.cli.choices import ModelChoice

    folder = tmp_path / "detector"
    folder.mkdir()
    (folder / "guard.json").write_text("{}")
    before = ModelChoice(model="smollm2-135m", detector=str(folder)).detector_settings()
    assert ModelChoice(model="smollm2-135m", detector=str(folder)).detector_settings() == before
    (folder / "guard.json").write_text('{"threshold": 0.4}')
    assert ModelChoice(model="smollm2-135m", detector=str(folder)).detector_settings() != before


def test_the_input_is_never_written(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    for flags in ((), ("--force",), ("--resume",)):
        assert refused(run(*SCORE, source, "-o", source, *flags), "is the input")
    (tmp_path / "link.jsonl").symlink_to(source)
    assert refused(run(*SCORE, source, "-o", tmp_path / "link.jsonl", "--force"), "is the input")
    assert source.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked on POSIX only")
def test_two_runs_do_not_write_one_file(source: Path, out: Path, tmp_path: Path) -> None:
    command = ("score", "--detector", "unit.cli_fakes:Slow", source, "-o", out, "--batch-size", "1")
    process = start(*command, calls=tmp_path / "calls")
    try:
        wait_for_lines(out, 1)
        assert refused(run(*SCORE, source, "-o", out, "--resume"), "written by another run")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupted_run_says_how_to_go_on(source: Path, out: Path, tmp_path: Path) -> None:
    command = ("score", "--detector", "unit.cli_fakes:Slow", source, "-o", out, "--batch-size", "1")
    process = start(*command, calls=tmp_path / "calls")
    wait_for_lines(out, 2)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"--resume goes on from there" in messages
    assert b"Traceback" not in messages
