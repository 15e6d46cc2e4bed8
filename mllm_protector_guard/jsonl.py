"""Files of JSON lines: the one reader and writer for rows of questions and answers.

A line ends at a line feed and nowhere else. Blank lines are skipped but counted. A file may be gzipped, which
is seen by its first bytes and not by its name. A message about a bad line never holds its content.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn, TypeVar

from pydantic import BaseModel, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from mllm_protector_guard.errors import DataError

__all__ = ["AnyText", "Row", "dump_row", "open_binary", "parse_rows", "read_rows", "validate_row"]

Row = tuple[int, dict[str, Any]]
"""A 1-based line number and the fields of the object on that line."""

M = TypeVar("M", bound=BaseModel)


def _require_str(value: object) -> str:
    if isinstance(value, str):
        return value
    raise PydanticCustomError("text", "should be a string")


AnyText = Annotated[str, PlainValidator(_require_str)]
"""Any `str` as the field of a pydantic model; pydantic's own refuses the lone surrogates that a text may hold."""

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"


def read_rows(path: str | Path, *, on_bad_line: Callable[[DataError], None] | None = None) -> Iterator[Row]:
    """The rows of a file, in order, read as they are asked for.

    Args:
        path: JSON lines in UTF-8, gzipped or not.
        on_bad_line: Takes the error of each line that is no JSON object; reading then goes on with the
            next line. None raises the first one.

    Raises:
        DataError: A line is bad and there is no `on_bad_line`, or the file ends in the middle of its
            gzip stream.
        OSError: The file cannot be read.
    """
    with Path(path).open("rb") as file:
        yield from parse_rows(open_binary(file), path=path, on_bad_line=on_bad_line)


def open_binary(file: BinaryIO) -> BinaryIO:
    """`file` itself, or what it holds once unpacked when it starts as a gzip stream does."""
    buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)  # type: ignore[type-var]
    if buffered.peek(2)[:2] == _GZIP_MAGIC:
        return gzip.open(buffered)  # type: ignore[return-value]
    return buffered


def parse_rows(
    lines: Iterable[bytes],
    *,
    path: str | Path | None = None,
    on_bad_line: Callable[[DataError], None] | None = None,
) -> Iterator[Row]:
    """The rows of lines that are already at hand; `path` is only for messages. See `read_rows`."""
    number = 0
    numbered = enumerate(lines, start=1)
    while True:
        try:
            number, line = next(numbered)
        except StopIteration:
            return
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                "the gzip stream is cut off or damaged after this line; make the file anew", path=path, line=number
            ) from error
        content = line.removeprefix(_UTF8_BOM) if number == 1 else line
        if not content.strip():
            continue
        try:
            fields = _parse_object(content)
        except ValueError as error:
            bad = DataError(str(error), path=path, line=number)
            if on_bad_line is None:
                raise bad from None
            on_bad_line(bad)
        else:
            yield number, fields


def validate_row(model: type[M], fields: Mapping[str, Any], *, path: str | Path | None, line: int) -> M:
    """The fields as a value of `model`.

    Raises:
        DataError: A field is missing or has the wrong type; the message names it and not its content.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])!r}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_context=False, include_input=False)
        )
        raise DataError(problems, path=path, line=line) from None


def dump_row(fields: Mapping[str, Any]) -> bytes:
    """The fields as one line of JSON with its line feed, in UTF-8.

    Text stays readable. A row with a lone surrogate, which UTF-8 cannot hold, is written with ASCII escapes
    instead, so that every string comes back as it was.
    """
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(fields, allow_nan=False).encode() + b"\n"


def _parse_object(content: bytes) -> dict[str, Any]:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 at byte {error.start + 1}") from None
    try:
        fields = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deep") from None
    except ValueError:
        raise ValueError("not usable JSON: a number is not finite or too long") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object; write one {...} a line")
    return fields


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number
