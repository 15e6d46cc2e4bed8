"""The report of an evaluation: what is written as JSON, and what tables, pages and model cards are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mllm_protector_guard.errors import DataError
from mllm_protector_guard.evaluation.evaluate import Evaluation
from mllm_protector_guard.evaluation.latency import Latency
from mllm_protector_guard.evaluation.published import BenchmarkFigure

__all__ = ["ModelReport", "Report", "read_report", "write_json"]

_LATER_FILE_FIELDS = {"slices", "curves", "perturbed", "buried"}


class ModelReport(BaseModel):
    """What was measured of one detector.

    Attributes:
        name: What the report calls it.
        detector: Name, folder, hub id or import string; of a folder with a mark of its files.
        detector_polarity: As given for a foreign detector.
        detector_label: As given for a foreign detector.
        detector_template: As given for a foreign detector.
        device: As given.
        dtype: As given.
        weights_sha256: Of the safetensors files of a checkpoint of ours; None for others.
        threshold: Scores at or above it count as harmful.
        files: One for each file.
        mean: Of each rate over the files that define it, each file counted once.
        pooled: All rows together.
        latency: None if no answer was scored in this run.
        published: Its F1 on public benchmarks, if rows of theirs are among the files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    detector: str
    detector_polarity: str | None = None
    detector_label: str | None = None
    detector_template: str | None = None
    device: str
    dtype: str
    weights_sha256: str | None = None
    threshold: float
    files: list[Evaluation]
    mean: dict[str, float | None]
    pooled: Evaluation
    latency: Latency | None = None
    published: tuple[BenchmarkFigure, ...] = ()


class Report(BaseModel):
    """A whole report.

    In JSON it also has `detector`, `detector_polarity`, `detector_template`, `device`, `dtype`, `files` and `mean` of
    the first model at the top, without slices and curves, as version 0.1.0 wrote them; they are not read.

    Attributes:
        schema_version: Of this format.
        version: Of the package that measured.
        models: In the order they were named.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[2] = 2
    version: str
    models: list[ModelReport]


def write_json(report: Report) -> str:
    """The report as JSON; an undefined rate is null, never NaN."""
    fields: dict[str, Any] = {"schema_version": report.schema_version, "version": report.version}
    models = [model.model_dump(mode="json", exclude_none=False) for model in report.models]
    if models:
        fields |= _as_before(models[0])
    return json.dumps({**fields, "models": models}, indent=2, ensure_ascii=False, allow_nan=False)


def _as_before(model: dict[str, Any]) -> dict[str, Any]:
    names = ("detector", "detector_polarity", "detector_template", "device", "dtype")
    given = {name: model[name] for name in names if model[name] is not None}
    files: Sequence[dict[str, Any]] = model["files"]
    slim = [{name: value for name, value in one.items() if name not in _LATER_FILE_FIELDS} for one in files]
    return {**given, "files": slim, "mean": model["mean"]}


def read_report(path: Path) -> Report:
    """The report in a file that `evaluate` wrote.

    Raises:
        DataError: The file holds something else.
        OSError: It cannot be read.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fields = sorted({".".join(map(str, problem["loc"])) or problem["type"] for problem in error.errors()})
        raise DataError(
            f"no report of this version's `evaluate --json`; wrong: {', '.join(fields[:5])}. Evaluate again", path=path
        ) from None
