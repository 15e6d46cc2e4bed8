"""The demo and its transcripts."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from rich.cells import cell_len
from rich.console import Console

from langchain_mllm_protector import ProtectorGuard
from mllm_protector_guard import Turn, load_detector
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier

COOKBOOK = Path(__file__).parents[2] / "cookbook"
SAFE = "Let us [bold]talk[/bold] about gardens."


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(COOKBOOK))
    import demo

    return demo


def keyword_rows(demo: ModuleType) -> list:
    """Rows of a guard to which only answers with "money" are harmful."""
    guard = ProtectorGuard(detector=KeywordDetector({"money"}), detoxifier=ScriptedDetoxifier([SAFE]))
    return demo.run(demo.read_transcripts(), guard, Console(stderr=True, quiet=True))


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(COOKBOOK / "demo.py"), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
        timeout=280,
    )


def test_transcripts_cover_what_a_guard_meets(demo):
    transcripts = demo.read_transcripts()
    assert len(transcripts) >= 28
    for name in ("id", "question"):
        assert len({getattr(each, name) for each in transcripts}) == len(transcripts)
    kinds = Counter(each.kind for each in transcripts)
    assert set(kinds) == {"harmless", "harmful", "refusal", "tricky"}
    assert kinds["harmful"] >= 10
    assert {each.kind for each in transcripts if each.image} == set(kinds)
    assert {each.kind for each in transcripts if not each.image} == set(kinds)
    assert sum("\u4e00" <= each.question[0] <= "\u9fff" for each in transcripts) >= 3


def test_every_picture_is_a_small_png_and_is_used(demo):
    pictures = {path.name: path.read_bytes() for path in (COOKBOOK / "images").iterdir()}
    assert set(pictures) == {each.image for each in demo.read_transcripts() if each.image}
    assert all(content.startswith(b"\x89PNG") and len(content) < 5_000 for content in pictures.values())


def test_chain_hands_question_and_picture_to_the_detector(demo):
    detector = KeywordDetector({"money"})
    transcripts = demo.read_transcripts()
    demo.run(transcripts, ProtectorGuard(detector=detector, on_harm="withhold"), Console(quiet=True))
    turns = {turn.question: turn for call in detector.calls for turn in call}
    for each in transcripts:
        assert turns[each.question].answer == each.answer
        held = [image.content for image in turns[each.question].images]
        assert held == ([(COOKBOOK / "images" / each.image).read_bytes()] if each.image else [])


def test_totals_name_every_leak_and_every_wrong_alarm(demo):
    rows = keyword_rows(demo)
    totals = demo.Totals.of(rows)
    flagged = {row.transcript.id for row in rows if "money" in row.transcript.answer.casefold()}
    harmful = {row.transcript.id for row in rows if row.transcript.kind == "harmful"}
    assert set(totals.missed) == harmful - flagged != set()
    assert set(totals.wrongly_flagged) == flagged - harmful != set()
    assert totals.outcomes == {"passed": len(rows) - len(flagged), "detoxified": len(flagged)}
    assert totals.passed_unchanged == totals.outcomes["passed"]
    assert totals.question_matches == {"id": len(rows)}
    assert totals.images == sum(row.transcript.image is not None for row in rows)
    with (console := Console(width=200)).capture() as screen:
        console.print(demo.summary_of(totals))
    assert "LEAKED: " + ", ".join(totals.missed) in screen.get()
    assert "wrongly flagged: " + ", ".join(totals.wrongly_flagged) in screen.get()


def test_a_run_without_a_leak_says_so(demo):
    rows = [row for row in keyword_rows(demo) if not row.missed and not row.wrongly_flagged]
    with (console := Console(width=80)).capture() as screen:
        console.print(demo.summary_of(demo.Totals.of(rows)))
    assert "nothing leaked" in screen.get()
    assert "LEAKED" not in screen.get()
    assert "wrongly" not in screen.get()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_table_fits_the_screen_and_loses_no_row(demo, width):
    rows = keyword_rows(demo)
    with (console := Console(width=width)).capture() as screen:
        console.print(demo.table_of(rows))
    header, *lines = screen.get().rstrip("\n").split("\n")
    assert header.split() == ["id", "kind", "image", "outcome", "harm", "after", "what", "came", "out", "ms"]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        assert cell_len(line.rstrip()) <= width
        assert line.startswith(f"{row.transcript.id} ")
        assert row.outcome in line
        assert ("Let us [bold" in line) == (row.outcome == "detoxified")


@pytest.mark.slow
def test_demo_guards_with_the_default_model():
    result = start("--limit", "6", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    lines = (COOKBOOK / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    assert [row["transcript"] for row in report["rows"]] == [json.loads(line) for line in lines]
    for row in report["rows"]:
        answer = row["transcript"]["answer"]
        assert (row["text"] == answer) == (row["outcome"] == "passed")
        assert row["question_match"] == "id"
        assert row["images"] == (row["transcript"]["image"] is not None)
        assert 0.0 <= row["harm_score"] <= 1.0
        assert row["ms"] > 0.0
        assert (row["attempts"] > 0) == (row["outcome"] != "passed")
    assert sum(report["totals"]["outcomes"].values()) == 6


@pytest.mark.slow
def test_demo_prints_a_table_and_no_warnings():
    result = start("--limit", "2", COLUMNS="80")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].startswith("id ")
    assert "median time" in result.stdout


@pytest.mark.slow
def test_default_detector_tells_the_transcripts_apart(demo):
    transcripts = demo.read_transcripts()
    detector = load_detector()
    scores = detector.score([Turn(question=each.question, answer=each.answer) for each in transcripts])
    harmful = [score >= detector.threshold for score in scores]
    missed = [t.id for t, flag in zip(transcripts, harmful, strict=True) if t.kind == "harmful" and not flag]
    alarms = [t.id for t, flag in zip(transcripts, harmful, strict=True) if t.kind != "harmful" and flag]
    assert len(missed) <= 6, missed
    assert len(alarms) <= 3, alarms


@pytest.mark.slow
def test_demo_without_a_model_says_what_to_run(tmp_path):
    result = start("--limit", "1", MLLM_PROTECTOR_HOME=str(tmp_path), MLLM_PROTECTOR_OFFLINE="1")
    assert result.returncode == 2
    assert "mllm-protector pull" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_a_wrong_limit_is_refused(demo, monkeypatch, capsys, limit):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--limit", limit])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert "--limit" in capsys.readouterr().err
