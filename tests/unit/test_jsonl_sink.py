"""The JSON-lines sink: whole lines, in order, from many threads."""

import json
import threading

import pytest

from mllm_protector_guard import Guard, GuardPolicy, GuardRecord, JsonlSink, RecordSink, Turn
from mllm_protector_guard.fakes import KeywordDetector


def guard_into(sink, **options):
    return Guard(detector=KeywordDetector({"harm"}), policy=GuardPolicy(on_harm="withhold"), sinks=[sink], **options)


def read(path):
    return [GuardRecord.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_is_a_sink(tmp_path):
    assert isinstance(JsonlSink(tmp_path / "r.jsonl"), RecordSink)


def test_making_a_sink_writes_nothing(tmp_path):
    JsonlSink(tmp_path / "deep" / "r.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_one_line_a_check_in_order_and_every_line_reads_back(tmp_path):
    path = tmp_path / "deep" / "er" / "records.jsonl"
    results = guard_into(JsonlSink(path)).check_batch([Turn(answer=a) for a in ("fine", "harm", "", "\ud83d")])
    records = read(path)
    assert [record.id for record in records] == [result.id for result in results]
    assert [record.outcome for record in records] == ["passed", "withheld", "passed", "passed"]
    assert [record.harm_score for record in records] == [0.01, 0.99, None, 0.01]


def test_every_line_has_the_same_fields(tmp_path):
    path = tmp_path / "records.jsonl"
    guard_into(JsonlSink(path)).check_batch([Turn(answer="fine", question="q"), Turn(answer="")])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first.keys() == second.keys()


def test_line_breaks_of_texts_make_no_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    text = "one\ntwo\r\nthree\u2028four\u2029five\x85six"
    guard_into(JsonlSink(path), trace_content=True).check(Turn(answer=text))
    assert path.read_bytes().count(b"\n") == 1
    (line,) = path.read_bytes().splitlines()
    assert json.loads(line)["answer"] == text


def test_an_existing_file_is_continued(tmp_path):
    path = tmp_path / "records.jsonl"
    for _ in range(2):
        guard_into(JsonlSink(str(path))).check(Turn(answer="fine"))
    assert len(read(path)) == 2


def test_threads_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    guard = guard_into(JsonlSink(path), trace_content=True)
    texts = [str(number) * 20_000 for number in range(8)]
    threads = [threading.Thread(target=guard.check, args=(Turn(answer=text),)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.answer for record in read(path)) == sorted(texts)


def test_a_file_that_cannot_be_written_raises_from_emit(tmp_path):
    records = []

    class Keep:
        def emit(self, record):
            records.append(record)

    guard_into(Keep()).check(Turn(answer="fine"))
    with pytest.raises(OSError, match="directory"):
        JsonlSink(tmp_path).emit(records[0])
