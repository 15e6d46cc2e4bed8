import hashlib
import json
import random
import signal
from math import exp
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mllm_protector_guard import Guard, GuardPolicy, Turn, load_detector
from mllm_protector_guard.cli.main import app
from unit.cli_processes import start, wait_for_lines

READER = ("--detector", "unit.calibrate_fakes:reader")
SECRET = "a-private-text"
_WORDS = ["bread", "garden", "picture", "weather", "cat", "water", "salt", "mild"]


def run(*args: str | Path | float) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, args)])


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report(*args: str | Path | float, exit_code: int = 0) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == exit_code, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def refused(result: Result, because: str) -> bool:
    return result.exit_code == 2 and because in " ".join(result.stderr.split()) and not result.stdout


@pytest.fixture
def safe(tmp_path: Path) -> Path:
    """99 answers that score 0.000, 0.005, ... 0.490."""
    return write(tmp_path / "safe.jsonl", *({"question": f"q {n}", "answer": f"{n / 200}"} for n in range(99)))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """300 answers of three lengths with scores that are twice too sure."""
    drawn, rows = random.Random(0), []
    for n in range(300):
        log_odds = drawn.gauss(0.0, 2.0)
        score, tail = 1 / (1 + exp(-2 * log_odds)), " word" * (9, 99, 299)[n % 3]
        harmful = drawn.random() < 1 / (1 + exp(-log_odds))
        rows.append({"question": f"q {n // 2}", "answer": f"{score}{tail}", "harmful": harmful})
    return write(tmp_path / "dev.jsonl", *rows)


class TestThreshold:
    def test_it_lies_just_above_the_safe_answers_that_are_to_pass(self, safe: Path) -> None:
        got = report("--safe", safe, *READER, "--max-fpr", 0.05)
        assert got["threshold"]["before"] == 0.5
        assert 0.485 < got["threshold"]["after"] < 0.4855  # of 99 answers one may be flagged
        assert (got["safe"]["rows"], got["safe"]["flagged_before"], got["safe"]["flagged_after"]) == (99, 0, 1)
        assert (got["bound"], got["max_fpr"], got["confidence"]) == ("clopper-pearson", 0.05, 0.95)
        assert "with confidence 0.95" in got["meaning"]
        assert got["safe"]["files"] == [{"name": "safe.jsonl", "sha256": hashlib.sha256(safe.read_bytes()).hexdigest()}]
        assert got["labelled"] is got["output"] is got["revision"] is None

    def test_the_conformal_bound_promises_less_and_takes_a_lower_one(self, safe: Path) -> None:
        got = report("--safe", safe, *READER, "--max-fpr", 0.05, "--bound", "conformal")
        assert 0.47 < got["threshold"]["after"] < 0.4705  # of 99 answers four may be flagged
        assert got["confidence"] is None
        assert "on average" in got["meaning"]

    def test_several_files_are_one_sample(self, safe: Path, tmp_path: Path) -> None:
        more = write(tmp_path / "more.jsonl", *({"answer": f"0.4 {n}", "harmful": False} for n in range(200)))
        got = report("--safe", safe, "--safe", more, *READER)
        assert (got["safe"]["rows"], len(got["safe"]["files"])) == (299, 2)

    def test_too_few_answers_are_refused_before_anything_is_scored(self, safe: Path) -> None:
        result = run("--safe", safe, "--detector", "unit.calibrate_fakes:missing")
        assert refused(result, "99 safe answers are too few: the clopper-pearson bound needs at least 299")

    def test_the_table_shows_it_and_says_what_it_means(self, safe: Path) -> None:
        result = run("--safe", safe, *READER, "--max-fpr", 0.05)
        assert result.exit_code == 0
        for text in (
            "threshold",
            "0.4853",
            "flagged of 99 safe answers",
            "1 (1.01%)",
            "clopper-pearson: with confidence",
        ):
            assert text in " ".join(result.stdout.split())


class TestLabelled:
    def test_the_errors_are_told_before_and_after_by_length(self, safe: Path, labelled: Path) -> None:
        got = report("--safe", safe, "--labelled", labelled, *READER, "--max-fpr", 0.05)
        assert 1.5 < got["temperature"]["fitted"] < 2.5
        low, high = got["temperature"]["fitted_in_folds"]
        assert low < got["temperature"]["fitted"] < high
        everything, *lengths = got["labelled"]["reliability"]
        for error in ("ece", "nll"):
            assert everything["after"][error] < everything["before"][error]
        assert [(one["words"], one["before"]["rows"]) for one in lengths] == [
            ("< 50", 100),
            ("50–200", 100),
            ("> 200", 100),
        ]
        assert got["labelled"]["questions"] == 150
        rates = got["labelled"]["rates"]
        assert rates["recall"]["after"] > rates["recall"]["before"]  # the new threshold is lower

    def test_the_tables_show_them(self, safe: Path, labelled: Path) -> None:
        result = run("--safe", safe, "--labelled", labelled, *READER, "--max-fpr", 0.05)
        assert result.exit_code == 0, result.stderr
        for text in ("ECE", "Brier", "NLL", "50–200", "F1 on labelled answers", "FPR on labelled answers", "→"):
            assert text in result.stdout
        assert "nan" not in result.stdout.lower()

    def test_f1_may_raise_the_threshold(self, labelled: Path, tmp_path: Path) -> None:
        safe = write(tmp_path / "low.jsonl", *({"answer": f"0.01 {n}"} for n in range(59)))
        command = ("--safe", safe, "--labelled", labelled, *READER, "--max-fpr", 0.05)
        plain, raised = report(*command), report(*command, "--prefer", "f1")
        assert raised["threshold"]["after"] > plain["threshold"]["after"]
        assert raised["labelled"]["rates"]["f1"]["after"] > plain["labelled"]["rates"]["f1"]["after"]

    def test_f1_never_lowers_it(self, labelled: Path, tmp_path: Path) -> None:
        safe = write(tmp_path / "high.jsonl", *({"answer": f"0.97 {n}"} for n in range(59)))
        command = ("--safe", safe, "--labelled", labelled, *READER, "--max-fpr", 0.05)
        assert report(*command, "--prefer", "f1")["threshold"]["after"] >= report(*command)["threshold"]["after"] > 0.97

    def test_too_few_are_refused_before_anything_is_scored(self, safe: Path, tmp_path: Path) -> None:
        few = write(tmp_path / "few.jsonl", *({"question": "q", "answer": "0.1", "harmful": True} for _ in range(9)))
        result = run("--safe", safe, "--labelled", few, "--max-fpr", 0.05, "--detector", "unit.calibrate_fakes:missing")
        assert refused(result, "belong to 1 questions")


class TestRows:
    def test_what_is_left_out_is_counted_and_told(self, safe: Path, labelled: Path, tmp_path: Path) -> None:
        blank = write(tmp_path / "blank.jsonl", {"answer": " "}, {"question": "q 1", "answer": "0.1"})
        unknown = write(tmp_path / "unknown.jsonl", {"answer": "0.5"}, {"answer": "0.5", "harmful": None})
        files = ("--safe", safe, "--safe", blank, "--labelled", labelled, "--labelled", unknown)
        result = run(*files, *READER, "--max-fpr", 0.05, "--json")
        assert result.exit_code == 0
        got = json.loads(result.stdout)
        assert (got["safe"]["rows"], got["safe"]["questions"], got["safe"]["blank"]) == (100, 99, 1)
        assert (got["labelled"]["rows"], got["labelled"]["unlabelled"]) == (300, 2)
        for note in ("1 blank answers", "2 labelled answers have no label", "100 safe answers belong to 99 questions"):
            assert note in result.stderr

    def test_a_row_that_cannot_be_scored_counts_as_flagged(self, safe: Path, labelled: Path, tmp_path: Path) -> None:
        broken = write(tmp_path / "broken.jsonl", {"answer": SECRET})
        more = write(tmp_path / "more.jsonl", {"answer": SECRET, "harmful": True})
        files = ("--safe", safe, "--safe", broken, "--labelled", labelled, "--labelled", more)
        result = run(*files, *READER, "--max-fpr", 0.05, "--json")
        assert result.exit_code == 1
        got = json.loads(result.stdout)
        assert (got["safe"]["failed"], got["safe"]["flagged_after"], got["labelled"]["failed"]) == (1, 1, 1)
        assert got["threshold"]["after"] > 0.49
        assert got["labelled"]["reliability"][0]["before"]["rows"] == 300
        assert SECRET not in result.stderr

    def test_a_malformed_line_or_a_harmful_safe_answer_ends_it(self, safe: Path, tmp_path: Path) -> None:
        harmful = write(tmp_path / "a.jsonl", {"answer": "0.1"}, {"answer": SECRET, "harmful": True})
        result = run("--safe", safe, "--safe", harmful, *READER, "--max-fpr", 0.05)
        assert result.exit_code == 1
        assert f"{harmful}:2: labelled harmful" in result.stderr
        malformed = write(tmp_path / "b.jsonl", {"question": SECRET})
        result = run("--safe", safe, "--safe", malformed, *READER, "--max-fpr", 0.05)
        assert result.exit_code == 1
        assert f"{malformed}:1: " in result.stderr
        assert SECRET not in result.stderr


class TestUsage:
    def test_wrong_usage_is_exit_code_2(self, safe: Path, tmp_path: Path) -> None:
        small = ("--safe", safe, *READER, "--max-fpr", 0.05)
        assert refused(run("--safe", safe, *READER, "--max-fpr", 0), "max_fpr is 0.0")
        assert refused(run(*small, "--confidence", 1), "confidence is 1.0")
        assert refused(run(*small, "--confidence", 0.9, "--bound", "conformal"), "--confidence is for")
        assert refused(run(*small, "--prefer", "f1"), "give --labelled")
        assert refused(run(*small, "--scores", safe), "is the input")
        assert run(*READER).exit_code == 2
        assert run("--safe", tmp_path / "missing.jsonl", *READER).exit_code == 2

    def test_a_foreign_detector_gets_its_threshold_printed_and_no_copy(
        self, safe: Path, labelled: Path, tmp_path: Path
    ) -> None:
        small = ("--safe", safe, "--labelled", labelled, *READER, "--max-fpr", 0.05)
        result = run(*small, "--json")
        threshold = json.loads(result.stdout)["threshold"]["after"]
        assert 0.485 < threshold < 0.4855  # on the scores as they are, whatever the temperature
        assert f"pass threshold={threshold!r} to load_detector()" in result.stderr
        assert "takes no temperature" in " ".join(result.stderr.split())
        assert refused(run(*small, "--output", tmp_path / "copy"), "has no guard.json")
        assert not (tmp_path / "copy").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models.tiny import chat_tokenizer, save_causal_lm, save_detector

    folder = tmp_path_factory.mktemp("calibrate")
    return save_detector(folder / "detector", save_causal_lm(folder / "base", chat_tokenizer()), temperature=3.0)


class TestCopy:
    @staticmethod
    def answers(count: int, seed: int) -> list[str]:
        drawn = random.Random(seed)
        return [" ".join(drawn.choices(_WORDS, k=drawn.randint(3, 9))) for _ in range(count)]

    @pytest.mark.slow
    def test_the_copy_flags_what_was_promised(self, checkpoint: Path, tmp_path: Path) -> None:
        turns = [Turn(question=f"q {n}", answer=answer) for n, answer in enumerate(self.answers(120, 1))]
        safe = write(tmp_path / "safe.jsonl", *({"question": turn.question, "answer": turn.answer} for turn in turns))
        # A random detector knows nothing of harm, so that the labels are made to follow its scores, with exceptions.
        answers, drawn = self.answers(80, 2), random.Random(3)
        scored = load_detector(checkpoint, device="cpu").score([Turn(answer=answer) for answer in answers])
        labels = [(score > sorted(scored)[40]) ^ (drawn.random() < 0.2) for score in scored]
        pairs = zip(answers, labels, strict=True)
        dev = write(tmp_path / "dev.jsonl", *({"answer": answer, "harmful": label} for answer, label in pairs))
        before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        command = ("--safe", safe, "--labelled", dev, "--detector", checkpoint, "--device", "cpu", "--max-fpr", 0.05)
        got = report(*command, "-o", tmp_path / "copy")
        assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before

        detector = load_detector(tmp_path / "copy", device="cpu")
        config = detector.config
        assert config.threshold == got["threshold"]["after"] != 0.5
        assert config.temperature == pytest.approx(3.0 * got["temperature"]["fitted"])
        assert config.revision == got["revision"]
        guard = Guard(detector=detector, policy=GuardPolicy(on_harm="flag"))
        assert guard.threshold == config.threshold
        flagged = sum(result.outcome == "flagged" for result in guard.check_batch(turns))
        record = config.calibration
        assert record is not None
        assert flagged == record.safe_flagged == got["safe"]["flagged_after"] == 1  # P(Binomial(120, 0.05) <= 2) > 0.05
        assert record.safe_sha256 == (hashlib.sha256(safe.read_bytes()).hexdigest(),)
        assert record.labelled_sha256 == (hashlib.sha256(dev.read_bytes()).hexdigest(),)
        assert (record.safe_rows, record.labelled_rows, record.bound) == (120, 80, "clopper-pearson")
        assert record.ece_after == got["labelled"]["reliability"][0]["after"]["ece"]

        assert refused(run(*command, "-o", tmp_path / "copy"), "exists; give another --output, or --force")
        assert report(*command, "-o", tmp_path / "copy", "--force")["revision"] == got["revision"]
        assert refused(run(*command, "-o", checkpoint, "--force"), "overlap")


@pytest.mark.slow
def test_a_killed_calibration_goes_on_from_its_scores(safe: Path, tmp_path: Path) -> None:
    scores, calls = tmp_path / "scores.jsonl", tmp_path / "calls"
    small = ("--safe", safe, "--max-fpr", 0.05, "--json")
    command = (*small, "--detector", "unit.calibrate_fakes:SlowReader", "--batch-size", 1, "--scores", scores)
    process = start("calibrate", *command, calls=calls, text=True)
    wait_for_lines(scores, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = scores.read_bytes().count(b"\n")
    assert 5 <= done < 99
    calls.unlink()

    process = start("calibrate", *command, calls=calls, text=True)
    output, messages = process.communicate(timeout=200)
    assert process.returncode == 0, messages
    assert sum(map(int, calls.read_text().split())) == 99 - done
    assert json.loads(output)["threshold"] == report(*small, *READER)["threshold"]
