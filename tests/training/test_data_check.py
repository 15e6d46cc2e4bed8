import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.training.check import check_files
from mllm_protector_guard.training.clean import write_clean
from mllm_protector_guard.training.findings import CheckReport, to_json
from mllm_protector_guard.training.shingles import NearTexts, jaccard, leaders, shingles

LONG = "First you wash the apples and cut them in thin slices then you lay them on the dough and bake it for {} minutes"
WORDS = [f"word{number}" for number in range(500)]


def row(question: str | None, answer: str, harmful: bool | None = False, **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, "harmful": harmful, **more}


def triple(question: str, rejected: str, accepted: str) -> dict[str, Any]:
    return {"question": question, "rejected": rejected, "accepted": accepted, "source": "test"}


def written(path: Path, rows: Iterable[dict[str, Any] | str]) -> Path:
    lines = (one if isinstance(one, str) else json.dumps(one) for one in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def found(report: CheckReport) -> list[tuple[str, int | None]]:
    return [(finding.kind, finding.place.line) for finding in report.findings]


def texts(count: int, seed: int, words: int = 40) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=words)) for _ in range(count)]


class TestShingles:
    def test_case_signs_and_spaces_do_not_count(self):
        of = shingles()
        assert jaccard(of("Mix the flour, then  WAIT!"), of("mix the flour then wait")) == 1.0

    def test_the_index_is_that_of_the_word_runs(self):
        of = shingles()
        # abc bcd cde against abc bcd cdf: two of four runs are shared.
        assert jaccard(of("a b c d e"), of("a b c d f")) == 0.5
        assert jaccard(of("a b c"), of("c b a")) == 0.0

    def test_scripts_without_spaces_are_read_by_character(self):
        of = shingles()
        assert 0.5 < jaccard(of("今天天气很好我们去公园"), of("今天天气很好我们去花园")) < 1.0
        assert jaccard(of("今天天气很好"), of("我想学做面包")) == 0.0

    @pytest.mark.parametrize("text", ["", " ", "?!", "\ud800", "one", "one two", "🙂"])
    def test_short_texts_are_like_themselves_alone(self, text):
        of = shingles()
        assert jaccard(of(text), of(text)) == 1.0
        assert jaccard(of(text), of("quite another text than this")) == 0.0

    def test_order_of_words_and_repeated_words_matter(self):
        of = shingles()
        assert jaccard(of("no"), of("no no")) < 1.0

    @pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.95])
    def test_leaders_are_those_that_a_comparison_of_all_pairs_finds(self, similarity):
        drawn = random.Random(4)
        of = shingles()
        parts = []
        for question, answer in zip(texts(60, 1, 12), texts(60, 2), strict=True):
            for _ in range(5):
                changed = [drawn.choice(WORDS) if drawn.random() < 0.03 else word for word in answer.split()]
                parts.append((of(question), of(" ".join(changed))))
        expected: list[int] = []
        for index, mine in enumerate(parts):
            near = (
                other
                for other in sorted(set(expected))
                if all(jaccard(a, b) >= similarity for a, b in zip(mine, parts[other], strict=True))
            )
            expected.append(next(near, index))
        assert len(set(expected)) < len(parts)
        assert leaders(parts, similarity) == expected

    def test_texts_that_always_lead_are_not_grouped(self):
        of = shingles()
        parts = [(of("the same text here"),)] * 4
        assert leaders(parts, 0.8) == [0, 0, 0, 0]
        assert leaders(parts, 0.8, always_lead=2) == [0, 1, 0, 0]

    def test_no_texts_have_no_leaders(self):
        assert leaders([], 0.8) == []

    def test_near_texts_keeps_what_is_new(self):
        seen = NearTexts(0.7)
        assert seen.add(LONG.format(40))
        assert not seen.add(LONG.format(50))
        assert not seen.add(LONG.format(40).upper())
        assert seen.add("Something else altogether, about a garden")


class TestRows:
    def test_all_bad_lines_are_told_by_line_and_without_their_text(self, tmp_path):
        path = written(
            tmp_path / "rows.jsonl",
            [
                row("q1", "a secret answer"),
                "not json",
                {"question": "q2", "answer": "a secret answer"},
                row("q3", "x", "yes"),  # type: ignore[arg-type]
                {"question": 3, "answer": "x", "harmful": True},
                triple("q4", "x", "y"),
                "",
                row("q5", "fine"),
            ],
        )
        report = check_files([path])
        assert found(report) == [("malformed", line) for line in (2, 3, 4, 5, 6)]
        assert "'harmful': Field required" in report.findings[1].detail
        assert "secret" not in json.dumps(to_json(report, max_findings=10))
        assert (report.files[0].rows, report.files[0].malformed) == (2, 5)

    def test_a_file_without_a_usable_row_is_a_finding(self, tmp_path):
        report = check_files([written(tmp_path / "empty.jsonl", [])])
        assert found(report) == [("malformed", None)]

    def test_a_file_that_is_cut_off_is_a_finding_and_its_rows_count(self, tmp_path):
        whole = gzip.compress("".join(json.dumps(row(f"q{n}", t)) + "\n" for n, t in enumerate(texts(900, 3))).encode())
        path = tmp_path / "cut.jsonl.gz"
        path.write_bytes(whole[: len(whole) // 2])
        report = check_files([path])
        assert [finding.kind for finding in report.findings] == ["malformed"]
        assert "cut off" in report.findings[0].detail
        assert report.files[0].rows > 100

    def test_unknown_fields_and_blank_texts(self, tmp_path):
        rows = [row("q", "fine", lang="en"), row("", "an answer"), row("q", " \n"), row(None, "no question")]
        report = check_files([written(tmp_path / "rows.jsonl", rows)])
        assert found(report) == [("unknown_field", 1), ("blank", 2), ("blank", 3)]
        assert [finding.detail for finding in report.findings] == ["'lang'", "question", "answer"]
        assert report.files[0].unknown_questions == 1

    def test_triples_that_change_nothing_or_get_long(self, tmp_path):
        rows = [
            triple("q1", "Yes, do that.", "Yes, do that. "),
            triple("q2", "Yes.", " ".join(texts(1, 5, 90))),
            triple("q3", "Rather not good advice.", "Better ask somebody who knows."),
            triple("q4", "Some advice", ""),
        ]
        report = check_files([written(tmp_path / "rows.jsonl", rows)])
        assert found(report) == [("unchanged", 1), ("long_accepted", 2), ("blank", 4)]
        assert report.findings[2].detail == "accepted"
        assert report.files[0].kind == "triples"

    def test_the_kind_can_be_forced(self, tmp_path):
        path = written(tmp_path / "rows.jsonl", [row("q", "a")])
        assert [kind for kind, _ in found(check_files([path], kind="triples"))] == ["malformed", "malformed"]


class TestRepetition:
    def test_the_same_and_nearly_the_same(self, tmp_path):
        rows = [
            row("How long does a pie take?", LONG.format(40)),
            row("How long does a pie take?", LONG.format(40)),
            row("how long does a pie take", LONG.format(50)),
            row("How do I wash a car?", LONG.format(40)),
            row(None, LONG.format(40)),
            row("", LONG.format(40)),
        ]
        report = check_files([written(tmp_path / "rows.jsonl", rows)])
        assert found(report) == [("duplicate", 2), ("near_duplicate", 3), ("blank", 6)]
        assert [finding.other.line for finding in report.findings[:2]] == [1, 1]

    def test_a_short_answer_under_a_long_question_is_not_near_another(self, tmp_path):
        rows = [row(LONG.format(40), "Yes."), row(LONG.format(40), "Never do it.")]
        assert found(check_files([written(tmp_path / "rows.jsonl", rows)])) == []

    def test_triples_repeat_when_both_answers_do(self, tmp_path):
        first, second = LONG.format(40), " ".join(texts(1, 8))
        rows = [
            triple("What now?", first, second),
            triple("What now?", first, " ".join(texts(1, 9))),
            triple("What now?", LONG.format(45), second),
        ]
        assert found(check_files([written(tmp_path / "rows.jsonl", rows)])) == [("near_duplicate", 3)]

    def test_rows_of_two_files_overlap(self, tmp_path):
        a = written(tmp_path / "a.jsonl", [row("q", text) for text in texts(5, 1)])
        b = written(tmp_path / "b.jsonl", [row("q", text) for text in [*texts(2, 1), *texts(3, 2)]])
        report = check_files([a, b])
        assert found(report) == [("overlap", 1), ("overlap", 2)]
        assert report.shared == {(b, a): 2}

    def test_one_file_cannot_be_named_twice(self, tmp_path):
        path = written(tmp_path / "a.jsonl", [row("q", "a")])
        with pytest.raises(ConfigError, match="twice"):
            check_files([path], against=[path])


class TestConflicts:
    def test_another_label_is_a_conflict_and_no_duplicate(self, tmp_path):
        rows = [
            row("q", LONG.format(40), True),
            row("q", LONG.format(40), False),
            row("q", LONG.format(45), False),
            row("another question", LONG.format(40), False),
            row("q", LONG.format(40), None),
        ]
        report = check_files([written(tmp_path / "rows.jsonl", rows)])
        assert found(report) == [("conflict", 2), ("near_conflict", 3)]
        assert {finding.other.line for finding in report.findings} == {1}

    def test_a_turn_that_one_triple_accepts_and_another_rejects(self, tmp_path):
        good, bad, third = texts(3, 6)
        rows = [triple("q", bad, good), triple("q", good, third)]
        assert found(check_files([written(tmp_path / "rows.jsonl", rows)])) == [("conflict", 2)]

    def test_a_correction_of_one_word_is_none(self, tmp_path):
        rows = [triple("q", LONG.format(40), LONG.format(45))]
        assert found(check_files([written(tmp_path / "rows.jsonl", rows)])) == []


class TestLeaks:
    def test_evaluation_turns_of_either_kind_are_found(self, tmp_path):
        one, two, three, four = texts(4, 1)
        hidden = written(tmp_path / "eval.jsonl", [row("q", one, True), row("q", two), row("q", two + " more")])
        detector = written(tmp_path / "detector.jsonl", [row("q", one + " extra", True), row("q", three)])
        triples = written(tmp_path / "triples.jsonl", [triple("q", four, two), triple("q", four, three)])
        report = check_files([detector, triples], against=[hidden])
        assert found(report) == [("leak", 1), ("leak", 1)]
        assert [finding.other.line for finding in report.findings] == [1, 2]
        assert report.shared == {(detector, hidden): 1, (triples, hidden): 1}
        assert (report.against[0].rows, len(report.files)) == (3, 2)

    def test_of_the_evaluation_file_only_what_cannot_be_read_is_reported(self, tmp_path):
        hidden = written(tmp_path / "eval.jsonl", ["bad line", row("q", "a"), row("q", "a"), row("q", "")])
        train = written(tmp_path / "train.jsonl", [row("q", "something else")])
        report = check_files([train], against=[hidden])
        assert [str(finding.place) for finding in report.findings] == [f"{hidden}:1"]
        assert found(report) == [("malformed", 1)]


class TestBalance:
    def test_answers_told_by_their_length_are_a_finding(self, tmp_path):
        rows = [row("q", text, True) for text in texts(20, 1, 60)] + [row("q", text) for text in texts(20, 2, 10)]
        path = written(tmp_path / "rows.jsonl", rows)
        report = check_files([path])
        assert found(report) == [("length_leak", None)]
        assert report.files[0].length_auroc == 1.0
        assert "harmful answers are the longer ones" in report.findings[0].detail
        assert found(check_files([path], max_length_auroc=1.0)) == []

    def test_balance_languages_and_licences_are_counted(self, tmp_path):
        rows = [
            row("q1", "aaaa", True, extra={"lang": "en", "licence": "MIT"}),
            row("q2", "bb", False, extra={"lang": "en", "licence": "Apache-2.0"}),
            row("q3", "cccc", False, extra={"lang": "zh"}),
            row("q4", "d", None),
        ]
        fields = to_json(check_files([written(tmp_path / "rows.jsonl", rows)], max_length_auroc=1), max_findings=1)
        (one,) = fields["files"]
        assert (one["harmful"], one["harmless"], one["unlabelled"]) == (1, 2, 1)
        assert (one["median_chars_harmful"], one["median_chars_harmless"]) == (4, 3)
        assert one["length_auroc"] == 0.75
        assert one["languages"] == {"en": 2, "zh": 1}
        assert one["licences"] == {"MIT": 1, "Apache-2.0": 1}


class TestClean:
    def test_what_is_written_has_nothing_left_to_find(self, tmp_path):
        a, b, c, d = texts(4, 1)
        hidden = written(tmp_path / "eval.jsonl", [row("q", d)])
        rows = [
            row("q", a, extra={"n": 1}),
            "bad",
            row("q", a),
            row("q", b, True),
            row("q", b, False),
            row("q", b + " indeed", False),
            row("q", c),
            row("q", d),
            row("q", ""),
        ]
        train = written(tmp_path / "train.jsonl", rows)
        report = check_files([train], against=[hidden], max_length_auroc=1)
        clean = tmp_path / "clean"
        assert write_clean(report, clean) == {clean / "train.jsonl": 2}
        kept = [json.loads(line) for line in (clean / "train.jsonl").read_text().splitlines()]
        assert kept == [rows[0], rows[6]]
        assert report.left_out[train] == {
            2: "malformed",
            3: "duplicate",
            4: "conflict",
            5: "conflict",
            6: "near_conflict",
            8: "leak",
            9: "blank",
        }
        assert not check_files([clean / "train.jsonl"], against=[hidden]).findings
        assert [path.name for path in clean.iterdir()] == ["train.jsonl"]

    def test_a_packed_file_comes_out_as_plain_lines(self, tmp_path):
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(json.dumps(row("q", "a")).encode() + b"\n"))
        write_clean(check_files([path]), tmp_path / "clean")
        assert json.loads((tmp_path / "clean" / "rows.jsonl").read_text()) == row("q", "a")

    def test_nothing_is_written_over_by_accident(self, tmp_path):
        path = written(tmp_path / "rows.jsonl", [row("q", "a")])
        report = check_files([path])
        with pytest.raises(ConfigError, match="one of the inputs"):
            write_clean(report, tmp_path, force=True)
        write_clean(report, tmp_path / "clean")
        with pytest.raises(ConfigError, match="--force"):
            write_clean(report, tmp_path / "clean")
        write_clean(report, tmp_path / "clean", force=True)
        (tmp_path / "other").mkdir()
        other = written(tmp_path / "other" / "rows.jsonl", [row("q", "b")])
        with pytest.raises(ConfigError, match="same name"):
            write_clean(check_files([path, other]), tmp_path / "third")


def test_a_group_of_thousands_costs_no_comparison_of_all_pairs(tmp_path, monkeypatch):
    calls = 0
    whole = np.intersect1d

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return whole(*args, **options)

    monkeypatch.setattr(np, "intersect1d", counting)
    rows = [row("What do I do?", f"{LONG.format(40)} or {number}") for number in range(2000)]
    report = check_files([written(tmp_path / "rows.jsonl", rows)])
    assert report.counts == {"near_duplicate": 1999}
    assert calls <= 2 * 2000
