import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from mllm_protector_guard import DataError
from mllm_protector_guard.jsonl import AnyText, dump_row, parse_rows, read_rows, validate_row

SECRET = "a-private-text"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_rows_come_with_their_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"answer": "1"}\n\n   \r\n{"answer": "2"}\r\n{"answer": "3"}')
    assert list(read_rows(path)) == [(1, {"answer": "1"}), (4, {"answer": "2"}), (5, {"answer": "3"})]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "gzipped-without-a-suffix"])
def test_a_gzipped_file_reads_like_a_plain_one(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, gzip.compress(b'{"answer": "1"}\n{"answer": "2"}\n'))
    assert [fields["answer"] for _, fields in read_rows(path)] == ["1", "2"]


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    assert list(read_rows(write(tmp_path / "a", b'\xef\xbb\xbf{"a": 1}\n'))) == [(1, {"a": 1})]


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x1cfour"
    path = write(
        tmp_path / "a", json.dumps({"answer": text}, ensure_ascii=False).replace("\\u001c", "\\u001c").encode()
    )
    assert [fields["answer"] for _, fields in read_rows(path)] == [text]


BAD_LINES = {
    "not json": f'{{"answer": "{SECRET}"'.encode(),
    "a list": f'["{SECRET}"]'.encode(),
    "a string": f'"{SECRET}"'.encode(),
    "nan": f'{{"answer": "{SECRET}", "x": NaN}}'.encode(),
    "infinite": f'{{"answer": "{SECRET}", "x": 1e999}}'.encode(),
    "a huge integer": f'{{"answer": "{SECRET}", "x": {"9" * 5000}}}'.encode(),
    "deep": b'{"answer": ' + b"[" * 100_000,
    "latin-1": f'{{"answer": "{SECRET} é"}}'.encode("latin-1"),
    "utf-16": f'{{"answer": "{SECRET}"}}'.encode("utf-16"),
    "an encoded surrogate": b'{"answer": "\xed\xa0\x80"}',
    "an escape that is none": f'{{"answer": "\\x{SECRET}"}}'.encode(),
    "two objects": f'{{"answer": "{SECRET}"}} {{}}'.encode(),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_by_number_and_never_by_content(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "a.jsonl", b'{"answer": "1"}\n' + line + b'\n{"answer": "3"}\n')
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert (caught.value.line, caught.value.path) == (2, str(path))
    assert SECRET not in str(caught.value)
    assert str(caught.value).startswith(f"{path}:2: ")

    bad: list[DataError] = []
    assert [number for number, _ in read_rows(path, on_bad_line=bad.append)] == [1, 3]
    assert [error.line for error in bad] == [2]


def test_a_cut_gzip_stream_gives_its_rows_and_then_an_error(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"answer": str(n * 7919)}).encode() + b"\n" for n in range(20_000))
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(lines)[:-2000])
    seen: list[int] = []
    with pytest.raises(DataError, match="cut off or damaged") as caught:
        seen.extend(number for number, _ in read_rows(path, on_bad_line=lambda error: None))
    assert len(seen) > 1000
    assert caught.value.line == seen[-1]


def test_lines_without_a_file_are_named_by_number_alone() -> None:
    with pytest.raises(DataError, match=r"^1: not valid JSON"):
        list(parse_rows([b"{"]))


values: Callable[..., st.SearchStrategy[object]] = lambda: st.recursive(  # noqa: E731
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)
texts = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates and NUL included


@given(st.dictionaries(texts, values(), max_size=4))
def test_every_row_survives_writing_and_reading(fields: dict[str, object]) -> None:
    line = dump_row(fields)
    assert line.count(b"\n") == 1
    assert list(parse_rows([line])) == [(1, fields)]


def test_readable_text_is_written_as_it_reads() -> None:
    assert dump_row({"answer": "你好"}) == '{"answer": "你好"}\n'.encode()


def test_a_row_never_holds_nan() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        dump_row({"harm_score": float("nan")})


def test_a_wrong_field_is_named_without_its_content() -> None:
    class Wanted(BaseModel):
        answer: AnyText
        score: int

    with pytest.raises(DataError) as caught:
        validate_row(Wanted, {"answer": [SECRET], "score": SECRET}, path="f", line=7)
    assert str(caught.value).startswith("f:7: ")
    assert "'answer'" in str(caught.value)
    assert "'score'" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert validate_row(Wanted, {"answer": "\ud800", "score": 1}, path=None, line=1).answer == "\ud800"
