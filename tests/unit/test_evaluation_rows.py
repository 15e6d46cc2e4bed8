import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from mllm_protector_guard import ConfigError, DataError, Turn
from mllm_protector_guard.evaluation import Evaluation, LabelledRow, evaluate, macro_mean, read_labelled_rows
from mllm_protector_guard.evaluation.metrics import RATES
from mllm_protector_guard.fakes import KeywordDetector

SECRET = "a-private-text"


def row(answer: str, harmful: bool | None) -> LabelledRow:
    return LabelledRow(question="q", answer=answer, harmful=harmful)


def test_labelled_rows_are_read_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    rows = [
        {"question": "q", "answer": "a", "harmful": True, "source": "s", "extra": {"x": 1}},
        {"answer": "\ud800", "harmful": None, "another field \ud800": 1},
        {"answer": "b"},
    ]
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode()))
    assert [(line, r.question, r.answer, r.harmful) for line, r in read_labelled_rows(path)] == [
        (1, "q", "a", True),
        (3, None, "\ud800", None),
        (5, None, "b", None),
    ]


@pytest.mark.parametrize(
    "bad",
    [
        {"question": SECRET, "harmful": True},
        {"answer": 3, "harmful": True},
        {"answer": SECRET, "harmful": "yes"},
        {"answer": SECRET, "harmful": 1},
        {"answer": SECRET, "question": {}},
    ],
    ids=str,
)
def test_a_wrong_row_is_named_by_line_and_never_by_content(tmp_path: Path, bad: dict[str, object]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"answer": "a"}, bad, {"answer": "b"}])))
    with pytest.raises(DataError) as caught:
        list(read_labelled_rows(path))
    assert (caught.value.line, caught.value.path) == (2, str(path))
    assert SECRET not in str(caught.value)
    found: list[DataError] = []
    assert [line for line, _ in read_labelled_rows(path, on_bad_line=found.append)] == [1, 3]
    assert [error.line for error in found] == [2]


def test_evaluate_counts_every_row_and_scores_the_labelled_ones() -> None:
    detector = KeywordDetector({"bomb"})
    rows = [row("bomb", True), row("bread", False), row("bomb?", None), row("a bomb", False), row(" ", False)]
    result = evaluate(detector, rows, batch_size=2, name="set")
    assert (result.name, result.rows, result.unlabelled, result.failed, result.malformed) == ("set", 5, 1, 0, 0)
    assert result.threshold == 0.5
    metrics = result.metrics
    assert (metrics.true_positives, metrics.false_positives, metrics.true_negatives) == (1, 1, 2)
    asked = [turn.answer for call in detector.calls for turn in call]
    assert asked == ["bomb", "bread", "a bomb"]  # neither the unlabelled answer nor the blank one
    assert all(len(call) <= 2 for call in detector.calls)


def test_evaluate_takes_any_object_that_scores() -> None:
    class Lengths:
        threshold = 0.3

        def score(self, turns: Sequence[Turn]) -> list[float]:
            return [min(len(turn.answer) / 10, 1.0) for turn in turns]

    rows = [row("x" * n, n >= 5) for n in range(1, 10)]
    result = evaluate(Lengths(), rows)
    assert (result.threshold, result.metrics.auroc, result.metrics.recall) == (0.3, 1.0, 1.0)
    assert evaluate(Lengths(), rows, threshold=0.5).metrics.f1 == 1.0
    assert result.metrics.fpr == pytest.approx(0.5)  # 3 and 4 of 1 to 4


def test_a_row_that_cannot_be_scored_is_counted_and_not_measured() -> None:
    class Shaky(KeywordDetector):
        def score(self, turns: Sequence[Turn]) -> list[float]:
            if any("crash" in turn.answer for turn in turns):
                return [float("nan")] * len(turns)
            return super().score(turns)

    result = evaluate(Shaky({"bomb"}), [row("bomb", True), row("crash", True), row("b", False)], batch_size=1)
    assert (result.rows, result.failed, result.metrics.measured) == (3, 1, 2)
    assert result.metrics.f1 == 1.0


@pytest.mark.parametrize("wrong", [{"threshold": 1.5}, {"threshold": float("nan")}, {"batch_size": 0}], ids=str)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        evaluate(KeywordDetector({"bomb"}), [], **wrong)  # type: ignore[arg-type]


def test_the_mean_counts_each_file_once_and_leaves_out_what_is_undefined() -> None:
    detector = KeywordDetector({"bomb"})
    both = evaluate(detector, [row("bomb", True), row("x", True), row("x", False), row("y", False)])
    harmless = evaluate(detector, [row("bomb", False)] * 100)
    means = macro_mean([both, harmless])
    expected = {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "auroc": 0.75, "fpr": 0.5}
    assert {rate: means[rate] for rate in expected} == expected
    assert set(means) == set(RATES)
    assert macro_mean([harmless])["f1"] is None


def test_the_language_is_read_where_a_row_names_one() -> None:
    rows = [{"lang": "zh"}, {"lang": 3}, {"lang": ""}, ["zh"], None]
    assert [LabelledRow(answer="a", extra=extra).lang for extra in rows] == ["zh", None, None, None, None]


def test_parts_of_the_rows_are_measured_apart() -> None:
    rows = [
        LabelledRow(answer="bomb", harmful=True, source="a", extra={"lang": "en"}),
        LabelledRow(answer="a bomb " + "x" * 400, harmful=False, source="a", extra={"lang": "en"}),
        LabelledRow(answer="bread", harmful=False, source="b", extra={"lang": "zh"}),
        LabelledRow(answer="rice", harmful=False, source="a"),
        LabelledRow(answer="rice", harmful=None, source="c"),
    ]
    slices = evaluate(KeywordDetector({"bomb"}), rows).slices
    found = {by: {one.value: one.metrics for one in parts} for by, parts in slices.items()}
    assert list(found["source"]) == ["a", "b"]  # the largest first; the row without a label has no part
    assert (found["source"]["a"].recall, found["source"]["a"].fpr) == (1.0, 0.5)
    assert (found["source"]["b"].recall, found["source"]["b"].fpr, found["source"]["b"].f1) == (None, 0.0, None)
    assert {lang: one.measured for lang, one in found["lang"].items()} == {"en": 2, "zh": 1, "(not given)": 1}
    assert {length: one.measured for length, one in found["length"].items()} == {"0–99": 3, "300–999": 1}


def test_an_evaluation_survives_json_with_its_metrics_beside_its_own_fields() -> None:
    result = evaluate(KeywordDetector({"bomb"}), [row("bomb", True), row("x", True), row("y", False)], name="set")
    fields = result.model_dump(mode="json")
    assert (fields["recall"], fields["harmful"], fields["harmless"]) == (0.5, 2, 1)
    assert "metrics" not in fields
    assert Evaluation.model_validate_json(result.model_dump_json()) == result
