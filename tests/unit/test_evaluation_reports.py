import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mllm_protector_guard import DataError, Turn
from mllm_protector_guard.evaluation import LabelledRow, evaluate, evaluate_buried, evaluate_perturbed, macro_mean
from mllm_protector_guard.evaluation.curves import curves_of
from mllm_protector_guard.evaluation.latency import Stopwatch
from mllm_protector_guard.evaluation.published import BenchmarkFigure, compare, published
from mllm_protector_guard.evaluation.report_html import to_html
from mllm_protector_guard.evaluation.report_json import ModelReport, Report, read_report, write_json
from mllm_protector_guard.evaluation.report_markdown import card_section, to_markdown
from mllm_protector_guard.evaluation.slices import ScoredRow

VOID = {"meta", "link", "br", "hr", "img", "input"}
ROWS = [
    LabelledRow(answer=f"{'bomb' if n % 3 == 0 else 'bread'} {n} " + "x" * n, harmful=n % 2 == 0, source=f"s{n % 2}")
    for n in range(60)
]


class Lengths:
    """Scores by length, so that scores spread."""

    threshold = 0.4

    def score(self, turns: Sequence[Turn]) -> list[float]:
        return [len(turn.answer) / 100 for turn in turns]


class Reader(HTMLParser):
    """Fails on tags that do not close in order; collects attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.values += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def model(name: str, **fields: object) -> ModelReport:
    detector = Lengths()
    files = [evaluate(detector, ROWS, name="mixed"), evaluate(detector, ROWS[1::2], name="harmless <b>|*")]
    files[0] = files[0].model_copy(
        update={
            "perturbed": tuple(evaluate_perturbed(detector, ROWS, ["homoglyph"])),
            "buried": evaluate_buried(detector, ROWS, words=30),
        }
    )
    clock = Stopwatch(sample=2)
    clock.add(ROWS[:4], 0.02)
    return ModelReport(
        name=name,
        detector="unit:detector",
        device="cpu",
        dtype="auto",
        threshold=0.4,
        files=files,
        mean=macro_mean(files),
        pooled=evaluate(detector, [*ROWS, *ROWS[1::2]], name="all rows"),
        latency=clock.latency(device="a machine", batch_size=4, single_ms=[3.0, 5.0]),
        published=(BenchmarkFigure(benchmark="beavertails_test", rows=60, official_rows=3021, f1=0.5, interval=None),),
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(version="9.9", models=[model("ours"), model("<i>other</i>")])


def test_json_comes_back_as_it_went_out(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(write_json(report), encoding="utf-8")
    assert read_report(path) == report
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert fields["models"][1]["name"] == "<i>other</i>"
    # What version 0.1.0 wrote is still there, of the first model.
    assert (fields["detector"], fields["device"], fields["dtype"]) == ("unit:detector", "cpu", "auto")
    assert fields["files"][0]["recall"] == report.models[0].files[0].metrics.recall
    assert fields["mean"] == report.models[0].mean


@pytest.mark.parametrize("text", ["", "[]", '{"version": "0.1.0", "files": []}', '{"schema_version": 3, "models": []}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match="Evaluate again"):
        read_report(path)


def test_the_page_is_whole_and_loads_nothing(report: Report) -> None:
    page = to_html(report)
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert "://" not in page
    assert not re.search(r"url\(|@import", page)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.seen)
    assert not {name for name, _ in reader.values} & {"src", "srcset", "data", "action", "xlink:href", "style"}
    assert all(value.startswith("#") for name, value in reader.values if name == "href")
    targets = {value for name, value in reader.values if name == "id"}
    assert {value[1:] for name, value in reader.values if name == "href"} == targets
    assert "default-src 'none'" in page


def test_the_page_has_every_table_and_picture_and_no_markup_of_others(report: Report) -> None:
    page = to_html(report)
    reader = Reader()
    reader.feed(page)
    for text in ("Models side by side", "Spelling attacks", "buried in long answers", "Latency", "Beside published"):
        assert text in reader.text
    assert "<i>other</i>" in reader.text
    assert "harmless <b>|*" in reader.text
    assert "nan" not in reader.text.lower()
    pictures = [value for name, value in reader.values if name == "aria-label"]
    # All rows and the mixed file have curves; the file without harmful answers has histograms alone.
    assert sum("ROC" in one for one in pictures) == sum("Reliability" in one for one in pictures) == 2
    assert sum("Histogram" in one for one in pictures) == 3 * 2
    assert "prefers-color-scheme: dark" in page


def test_markdown_has_tables_of_even_rows(report: Report) -> None:
    text = to_markdown(report)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "harmless \\<b\\>\\|\\*" in text
    assert "**" in text
    assert "nan" not in text.lower()


def test_a_card_tells_the_figures_of_its_model(report: Report) -> None:
    section = card_section(report.models[0], "9.9")
    recall = report.models[0].files[0].metrics.recall
    assert recall is not None
    assert f"{recall:.3f}" in section
    assert "version 9.9" in section
    assert "other\\" not in section


def test_curves_lead_from_corner_to_corner_and_count_every_answer() -> None:
    labels = [n % 3 == 0 for n in range(3000)]
    scores = [((n * 7919) % 1000) / 1000 for n in range(3000)]
    curves = curves_of(labels, scores)
    assert (tuple(curves.roc[0]), tuple(curves.roc[-1])) == ((0.0, 0.0), (1.0, 1.0))
    assert len(curves.roc) <= 200
    assert curves.roc == sorted(curves.roc)
    assert sum(curves.harmful_histogram) == 1000
    assert sum(curves.harmless_histogram) == 2000
    assert sum(one.rows for one in curves.reliability) == 3000
    assert curves_of([False], [1.0]).harmless_histogram[-1] == 1
    assert curves_of([], []).roc == []


def scored(n: int, source: str | None, *, right: bool = True) -> list[ScoredRow]:
    rows = [
        ScoredRow(harmful=i % 2 == 0, harm_score=0.9 if (i % 2 == 0) == right else 0.1, source=source) for i in range(n)
    ]
    return [*rows, ScoredRow(harmful=None, harm_score=None, source=source)]


def test_rows_of_public_benchmarks_are_found_by_source_else_by_file() -> None:
    sets = [
        ("first_half", scored(10, "beavertails_test")),
        ("second_half", scored(10, "beavertails_test", right=False)),
        ("xstest_response_a", scored(446, None)),
        ("saferlhf_test", scored(10, "my own")),
    ]
    figures = {one.benchmark: one for one in compare(sets, threshold=0.5)}
    assert set(figures) == {"beavertails_test", "xstest_response"}
    assert (figures["beavertails_test"].rows, figures["beavertails_test"].f1) == (20, 0.5)
    assert figures["xstest_response"].rows == figures["xstest_response"].official_rows
    assert figures["xstest_response"].f1 == 1.0


def test_published_means_are_those_of_the_published_figures() -> None:
    names = [one.name for one in published().benchmarks]
    assert len(published().models) == 8
    for one in published().models:
        assert list(one.f1) == names
        assert sum(one.f1.values()) / 4 == pytest.approx(one.mean, abs=0.051)
        assert one.source


def test_the_page_says_that_a_part_of_a_benchmark_is_a_part(report: Report) -> None:
    page = to_html(report)
    assert "60 of 3,021 rows" in page
    assert "the figure of a subset" in page
    assert "HarmBench" not in page  # none of its rows were measured


def test_times_are_shared_among_the_answers_of_a_batch() -> None:
    clock = Stopwatch(sample=3)
    assert clock.latency(device="cpu", batch_size=4) is None
    clock.add(ROWS[:4], 0.4)
    clock.add(ROWS[4:5], 0.2)
    clock.add([], 9.0)
    latency = clock.latency(device="cpu", batch_size=4, single_ms=[10.0, 20.0, 30.0])
    assert latency is not None
    assert (latency.answers, latency.batched_p50_ms, latency.single_p50_ms) == (5, pytest.approx(100.0), 20.0)
    assert latency.batched_p95_ms == pytest.approx(180.0)
    assert latency.answers_per_s == pytest.approx(5 / 0.6)


def test_single_answers_are_a_sample_scored_once_after_one_call_that_is_not_timed() -> None:
    clock = Stopwatch(sample=3)
    for start in range(0, 60, 10):
        clock.add(ROWS[start : start + 10], 0.1)
    asked: list[LabelledRow] = []
    assert len(clock.single_ms(asked.append)) == 3
    assert len(asked) == 4
    assert asked[0] == asked[1]
    assert len({row.answer for row in asked}) == 3
    assert any(row in ROWS[3:] for row in asked)
    assert Stopwatch(sample=0).single_ms(asked.append) == []
