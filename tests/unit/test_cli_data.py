import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mllm_protector_guard.cli.main import app
from training.chat_server import Answer, ChatServer, draft, good, serving
from unit.cli_processes import start, wait_for_lines


def run(*args: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, args)], env={"COLUMNS": "200", **(env or {})})


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(question: str, answer: str, harmful: bool = False) -> dict[str, Any]:
    return {"question": question, "answer": answer, "harmful": harmful, "source": "test"}


class TestCheck:
    @pytest.fixture
    def train(self, tmp_path: Path) -> Path:
        repeated = [row(f"How do I bake bread no. {n}?", f"a-private-text {n}") for n in (1, 2, 3, 1, 2, 3)]
        return written(tmp_path / "train.jsonl", *repeated, "no json")

    def test_a_clean_file_exits_0(self, tmp_path: Path) -> None:
        result = run("check", written(tmp_path / "rows.jsonl", row("q1", "a1"), row("q2", "a2", True)))
        assert result.exit_code == 0, result.stderr
        assert "2 rows, nothing found" in result.stderr

    def test_findings_exit_1_and_are_listed_without_texts(self, train: Path) -> None:
        result = run("check", train)
        assert result.exit_code == 1
        assert f"{train}:4: duplicate (see {train}:1)" in result.stdout
        assert f"{train}:7: malformed: not valid JSON" in result.stdout
        assert "a-private-text" not in result.output

    def test_json_counts_all_and_lists_some(self, train: Path) -> None:
        result = run("check", train, "--json", "--max-findings", "1")
        report = json.loads(result.stdout)
        assert report["counts"] == {"malformed": 1, "duplicate": 3}
        assert [finding["line"] for finding in report["findings"]] == [4, 7]
        assert report["findings"][0]["other"] == {"file": str(train), "line": 1}
        assert report["findings_not_shown"] == 2
        assert "a-private-text" not in result.output

    def test_the_table_says_how_many_it_does_not_list(self, train: Path) -> None:
        assert "and 2 more" in run("check", train, "--max-findings", "1").stdout

    def test_clean_files_are_written_and_the_reasons_told(self, train: Path, tmp_path: Path) -> None:
        hidden = written(tmp_path / "eval.jsonl", row("How do I bake bread no. 2?", "a-private-text 2"))
        clean = tmp_path / "clean"
        result = run("check", train, "--against", hidden, "--write-clean", clean)
        assert result.exit_code == 1
        assert "2 rows; left out: 2 leak, 2 duplicate, 1 malformed" in result.stderr
        assert rows_of(clean / "train.jsonl") == list(map(json.loads, _lines(train, 1, 3)))
        assert run("check", clean / "train.jsonl", "--against", hidden).exit_code == 0
        again = run("check", train, "--write-clean", clean)
        assert (again.exit_code, "--force" in again.stderr) == (2, True)

    def test_wrong_usage_exits_2(self, train: Path, tmp_path: Path) -> None:
        assert run("check").exit_code == 2
        assert run("check", tmp_path / "nothing.jsonl").exit_code == 2
        assert run("check", train, "--similarity", "0.1").exit_code == 2
        assert run("check", train, "--force").exit_code == 2
        assert run("check", train, "--against", train).exit_code == 2


def _lines(path: Path, *numbers: int) -> list[str]:
    lines = path.read_text().splitlines()
    return [lines[number - 1] for number in numbers]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving() as running:
        yield running


SOME = ("--scenario", "Fraud", "--scenario", "Hate_Speech", "--count", "3")


def at(server: ChatServer) -> tuple[str, ...]:
    return ("generate", "--endpoint", server.url, "--chat-model", "some-model", *SOME)


class TestDryRun:
    def test_prompts_are_printed_and_nobody_is_asked(self) -> None:
        result = run("generate", *SOME, "--endpoint", "http://127.0.0.1:9/v1", "--chat-model", "m", "--dry-run")
        assert result.exit_code == 0, result.output
        planned = [json.loads(line) for line in result.stdout.splitlines()]
        assert [one["scenario"] for one in planned] == ["Fraud", "Hate_Speech"] * 3
        assert planned[0]["prompts"][0][0]["role"] == "system"

    def test_the_steps_of_the_plain_protocol_are_shown(self) -> None:
        result = run("generate", *SOME, "--protocol", "plain", "--dry-run")
        assert [len(json.loads(line)["prompts"]) for line in result.stdout.splitlines()] == [3] * 6


class TestUsage:
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ((), "one of --endpoint URL and --local NAME"),
            (("--endpoint", "http://x/v1", "--local", "m"), "one of --endpoint URL and --local NAME"),
            (("--endpoint", "http://x/v1"), "--chat-model"),
            (("--endpoint", "x", "--chat-model", "m"), "https://host/v1"),
            (("--endpoint", "http://x/v1", "--chat-model", "m", "--api-key-env", "NO_SUCH_KEY"), "'NO_SUCH_KEY'"),
            (("--endpoint", "http://x/v1", "--chat-model", "m", "--body", "[]"), "--body"),
            (("--endpoint", "http://x/v1", "--chat-model", "m", "--body", "{"), "--body"),
            (("--endpoint", "http://x/v1", "--chat-model", "m", "--body", '{"model": "x"}'), "--body"),
            (("--endpoint", "http://x/v1", "--chat-model", "m", "--max-cost", "1"), "--price-in"),
            (("--endpoint", "http://x/v1", "--chat-model", "m", "--scenario", "Nothing"), "'Nothing'"),
            (("--local", "m", "--chat-model", "m"), "are for --endpoint"),
            (("--local", "/no/such/folder"), "/no/such/folder"),
        ],
    )
    def test_what_cannot_work_is_named(self, tmp_path: Path, options: tuple[str, ...], told: str) -> None:
        result = run("generate", "-o", tmp_path / "out.jsonl", *options)
        assert result.exit_code == 2, result.output
        assert told in result.stderr
        assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.enable_socket
class TestGenerate:
    def test_rows_are_written_and_pass_the_check(self, server: ChatServer, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        key = {"SOME_KEY": "a-secret-key"}
        result = run(
            *at(server), "-o", out, "--api-key-env", "SOME_KEY", "--price-in", "1", "--price-out", "2", env=key
        )
        assert result.exit_code == 0, result.output
        assert "6 drafts made, 0 missing, 6 requests, 600 + 1,200 tokens, cost 0.0030" in result.stderr
        assert {one["extra"]["scenario"] for one in rows_of(out)} == {"Fraud", "Hate_Speech"}
        assert server.headers[0]["Authorization"] == "Bearer a-secret-key"
        for text in (result.output, out.read_text(), (tmp_path / "out.jsonl.run.json").read_text()):
            assert "a-secret-key" not in text
        assert run("check", out).exit_code == 0

    def test_labelled_rows_on_standard_output(self, server: ChatServer) -> None:
        result = run(*at(server), "--as", "detector")
        labels = [json.loads(line)["harmful"] for line in result.stdout.splitlines()]
        assert sorted(labels) == [False] * 6 + [True] * 6

    def test_requests_are_limited_and_resume_goes_on(self, server: ChatServer, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        result = run(*at(server), "-o", out, "--max-requests", "2")
        assert result.exit_code == 1
        assert "--max-requests" in result.stderr
        assert len(rows_of(out)) == len(server.requests) == 2
        assert run(*at(server), "-o", out).exit_code == 2  # it is not written over
        assert run(*at(server), "-o", out, "--resume", "--seed", "1").exit_code == 2
        result = run(*at(server), "-o", out, "--resume")
        assert result.exit_code == 0, result.output
        assert "2 rows are there already; 4 drafts to make" in result.stderr
        assert len(rows_of(out)) == len(server.requests) == 6
        assert run(*at(server), "-o", out, "--resume").exit_code == 0
        assert len(server.requests) == 6

    def test_the_cost_is_limited(self, server: ChatServer, tmp_path: Path) -> None:
        prices = ("--max-cost", "0.0005", "--price-in", "1", "--price-out", "2", "--concurrency", "1")
        result = run(*at(server), "-o", tmp_path / "out.jsonl", *prices)
        assert (result.exit_code, len(server.requests)) == (1, 1)
        assert "the 0.0005 of --max-cost are spent" in result.stderr

    def test_known_questions_do_not_come_again(self, server: ChatServer, tmp_path: Path) -> None:
        known = written(tmp_path / "known.jsonl", json.loads(draft(1)))
        server.script = lambda request, number: Answer(text=draft(1))
        result = run(*at(server), "-o", tmp_path / "out.jsonl", "--known", known, "--tries", "1")
        assert result.exit_code == 1
        assert "6 question was there already" in result.stderr
        assert "6 missing" in result.stderr

    def test_a_refused_key_exits_2_without_rows(self, server: ChatServer, tmp_path: Path) -> None:
        server.script = lambda request, number: Answer(status=401)
        result = run(*at(server), "-o", tmp_path / "out.jsonl")
        assert result.exit_code == 2
        assert "status 401; check --endpoint, --chat-model, --api-key-env" in result.stderr

    def test_a_draft_that_lost_its_second_row_is_told(self, server: ChatServer, tmp_path: Path) -> None:
        out = tmp_path / "out.jsonl"
        command = (*at(server), "-o", out, "--as", "detector", "--concurrency", "1")
        run(*command, "--max-requests", "2")
        out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:3]) + b'{"question": "cut')
        result = run(*command, "--resume")
        assert "1 drafts have one row of two" in result.stderr
        assert len(rows_of(out)) == 3 + 2 * 4

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
    def test_a_killed_run_goes_on_and_asks_for_nothing_twice(self, server: ChatServer, tmp_path: Path) -> None:
        def slow(request: dict[str, Any], number: int) -> Answer:
            answer = good(request, number)
            answer.delay_s = 0.1
            return answer

        server.script = slow
        out = tmp_path / "out.jsonl"
        command = [*at(server), "--count", "20", "-o", str(out), "--concurrency", "2"]
        process = start("data", *command)
        wait_for_lines(out, 4)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kept = out.read_bytes()
        done = kept.count(b"\n")
        assert 4 <= done < 40
        server.requests.clear()
        result = run(*command, "--resume")
        assert result.exit_code == 0, result.output
        assert out.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
        rows = rows_of(out)
        assert len({(one["extra"]["scenario"], one["extra"]["item"]) for one in rows}) == len(rows) == 40
        assert len(server.requests) == 40 - done


def test_a_local_model_that_writes_nonsense_ends_with_a_count(tmp_path: Path) -> None:
    from models.tiny import chat_tokenizer, save_causal_lm

    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    folder = save_causal_lm(tmp_path / "chatting", tokenizer)
    options = ("--local", folder, "--max-tokens", "16", "--tries", "1", "--offline", *SOME)
    result = run("generate", *options, "--protocol", "json", "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 1, result.output
    assert "0 drafts made, 6 missing, 6 requests" in result.stderr
    assert "replies that could not be used: 6 " in result.stderr
    assert "--protocol plain" in result.stderr
