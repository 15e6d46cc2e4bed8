"""Labels kept apart from their answers, and joined with them by hash."""

import json
from importlib import resources

import pytest

from mllm_protector_guard import DataError
from mllm_protector_guard.training import train_detector
from mllm_protector_guard.training.joining import turn_sha256
from mllm_protector_guard.training.labels import join_labels
from mllm_protector_guard.training.rows import RewriteRow, read_training_rows
from training.tiny_runs import detector_recipe, write_rows

PAIR = {
    "question": "Is it late?",
    "rejected": "No.",
    "accepted": "Yes.",
    "source": "clock",
    "extra": {"licence": "MIT"},
}


def label(answer, harmful):
    return {"sha256": turn_sha256(PAIR["question"], answer), "harmful": harmful}


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", [PAIR])


def test_each_answer_of_a_pair_gets_the_label_that_was_given_to_it(pairs, tmp_path):
    labels = write_rows(tmp_path / "judged.v1.jsonl", [label("Yes.", True), label("No.", False)])
    joined = join_labels([labels], read_training_rows([pairs], RewriteRow))
    assert [(row.question, row.answer, row.harmful) for row in joined] == [
        ("Is it late?", "Yes.", True),
        ("Is it late?", "No.", False),
    ]
    assert {(row.source, row.file, row.extra["licence"]) for row in joined} == {("clock", "judged", "MIT")}


def test_a_label_for_no_answer_is_an_error(pairs, tmp_path):
    labels = write_rows(tmp_path / "labels.jsonl", [label("Yes.", True), label("planted", True)])
    with pytest.raises(DataError, match="1 labels are for answers that are in none") as caught:
        join_labels([labels], read_training_rows([pairs], RewriteRow))
    assert "planted" not in str(caught.value)


def test_a_line_without_a_label_is_an_error(pairs, tmp_path):
    labels = write_rows(tmp_path / "labels.jsonl", [{**label("Yes.", True), "harmful": None}])
    with pytest.raises(DataError, match="harmful"):
        join_labels([labels], read_training_rows([pairs], RewriteRow))


def test_joined_labels_are_trained_on_and_the_dev_ones_set_the_threshold(base, rows, dev, pairs, tmp_path, caplog):
    labels = write_rows(tmp_path / "judged.jsonl", [label("Yes.", True)])
    dev_labels = write_rows(tmp_path / "judged_dev.jsonl", [label("No.", True)])
    recipe = detector_recipe(
        base, sources={"file:judged": {"repeat": 3}}, metric_sources=("clock",), calibration_rows=5, epochs=0.1
    )
    with caplog.at_level("INFO"):
        train_detector(
            recipe,
            train=[rows],
            dev=[dev],
            pairs=[pairs],
            labels=[labels],
            dev_labels=[dev_labels],
            output=tmp_path / "out",
        )
    assert "'judged clock': 3" in caplog.text


@pytest.mark.parametrize("name", ["hh", "hh_mild", "hh_dev", "rewrites_harmless"])
def test_the_written_labels_are_whole(name):
    path = resources.files("mllm_protector_guard.training") / "written" / "labels" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["sha256"] for row in rows}) == len(rows) > 300
    assert all(set(row) == {"sha256", "harmful"} and len(row["sha256"]) == 64 for row in rows)
    kinds = {"hh_mild": {True}, "rewrites_harmless": {False}}
    assert {row["harmful"] for row in rows} == kinds.get(name, {True, False})


def test_no_answer_is_both_for_training_and_for_the_threshold():
    folder = resources.files("mllm_protector_guard.training") / "written" / "labels"

    def hashes(name):
        text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
        return {json.loads(line)["sha256"] for line in text.splitlines()}

    assert not hashes("hh_dev") & (hashes("hh") | hashes("hh_mild"))
