import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mllm_protector_guard.cli.detectors import weights_sha256
from mllm_protector_guard.cli.main import app
from mllm_protector_guard.evaluation import LabelledRow, evaluate, macro_mean
from mllm_protector_guard.evaluation.report_json import ModelReport, Report, write_json
from mllm_protector_guard.fakes import KeywordDetector
from mllm_protector_guard.models.checkpoint import (
    BaseReference,
    DetectorConfig,
    DetoxifierConfig,
    read_config,
    write_config,
)

CARD = "# A card\r\n\r\nWritten by hand.\r\n<!-- figures -->\nold\n<!-- /figures -->\nAlso by hand: 0.123\n"
COMMON = {"base": BaseReference(name="base"), "template": "chatml", "revision": "1", "licence": "Apache-2.0"}
ROWS = [LabelledRow(answer=text, harmful=harm) for text, harm in (("bomb", True), ("gun", True), ("milk", False))]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["card", *map(str, args)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "detector"
    write_config(folder, DetectorConfig(**COMMON, threshold=0.5, metrics={"old": {"f1": 0.1}}))  # type: ignore[arg-type]
    (folder / "head.safetensors").write_bytes(b"head")
    (folder / "README.md").write_bytes(CARD.encode())
    return folder


def model_report(folder: Path, **changes: object) -> ModelReport:
    files = [
        evaluate(KeywordDetector({"bomb"}), ROWS, name="mixed"),
        evaluate(KeywordDetector({"bomb"}), [], name="no"),
    ]
    fields = {
        "name": "ours",
        "detector": str(folder),
        "device": "cpu",
        "dtype": "auto",
        "weights_sha256": weights_sha256(folder),
        "threshold": 0.5,
        "files": files,
        "mean": macro_mean(files),
        "pooled": files[0],
    }
    return ModelReport.model_validate({**fields, **changes})


def write_report(path: Path, *models: ModelReport) -> Path:
    path.write_text(write_json(Report(version="9.9", models=list(models))), encoding="utf-8")
    return path


def test_the_figures_of_the_report_are_written_between_the_lines(folder: Path, tmp_path: Path) -> None:
    report = write_report(tmp_path / "report.json", model_report(folder))
    assert run(folder, "--evaluation", report).exit_code == 0
    card = (folder / "README.md").read_bytes().decode()
    before, _, rest = card.partition("<!-- figures -->")
    section, _, after = rest.partition("<!-- /figures -->")
    assert before == CARD.partition("<!-- figures -->")[0]  # carriage returns and all
    assert after == "\nAlso by hand: 0.123\n"
    assert "| mixed | 3 | 2 | 1.000" in section
    assert "\nold\n" not in section
    metrics = read_config(folder).metrics
    assert set(metrics) == {"mixed"}
    assert metrics["mixed"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": 0.6667,
        "auroc": 0.75,
        "auprc": 0.8333,
        "fpr": 0.0,
        "recall_at_1pct_fpr": 0.5,
        "ece": metrics["mixed"]["ece"],
    }


def test_a_check_passes_only_while_the_card_is_what_the_report_says(folder: Path, tmp_path: Path) -> None:
    report = write_report(tmp_path / "report.json", model_report(folder))
    files = [folder / "README.md", folder / "guard.json"]
    before = [path.read_bytes() for path in files]
    result = run(folder, "--evaluation", report, "--check")
    assert result.exit_code == 1
    assert "README.md and guard.json" in result.stderr
    assert [path.read_bytes() for path in files] == before
    assert run(folder, "--evaluation", report).exit_code == 0
    assert run(folder, "--evaluation", report, "--check").exit_code == 0
    filled = [path.read_bytes() for path in files]
    files[0].write_bytes(filled[0].replace(b"1.000", b"0.999"))
    assert run(folder, "--evaluation", report, "--check").exit_code == 1
    files[0].write_bytes(filled[0])
    files[1].write_bytes(filled[1].replace(b"0.6667", b"0.9667"))
    assert run(folder, "--evaluation", report, "--check").exit_code == 1
    assert run(folder, "--evaluation", report).exit_code == 0
    assert [path.read_bytes() for path in files] == filled


def test_figures_of_other_weights_or_another_threshold_are_refused(folder: Path, tmp_path: Path) -> None:
    other = write_report(tmp_path / "report.json", model_report(folder, weights_sha256="0" * 64))
    assert run(folder, "--evaluation", other).exit_code == 2
    report = write_report(tmp_path / "report.json", model_report(folder, threshold=0.4))
    result = run(folder, "--evaluation", report)
    assert result.exit_code == 2
    assert "threshold 0.4" in result.stderr
    (folder / "head.safetensors").write_bytes(b"trained again")
    result = run(folder, "--evaluation", write_report(tmp_path / "again.json", model_report(folder)))
    assert result.exit_code == 0
    assert run(folder, "--evaluation", other).exit_code == 2


def test_one_of_several_models_of_the_same_weights_is_named(folder: Path, tmp_path: Path) -> None:
    twin = model_report(folder, name="twin", files=[evaluate(KeywordDetector({"gun"}), ROWS[1:], name="twin set")])
    foreign = model_report(folder, name="foreign", weights_sha256=None)
    report = write_report(tmp_path / "report.json", foreign, model_report(folder), twin)
    result = run(folder, "--evaluation", report)
    assert result.exit_code == 2
    assert "'ours', 'twin'" in result.stderr
    assert run(folder, "--evaluation", report, "--name", "twin").exit_code == 0
    assert set(read_config(folder).metrics) == {"twin set"}
    assert run(folder, "--evaluation", report, "--name", "foreign").exit_code == 2


@pytest.mark.parametrize("card", [None, "# A card\n", "<!-- /figures --><!-- figures -->", CARD + CARD])
def test_a_card_without_its_place_for_figures_is_left_alone(folder: Path, tmp_path: Path, card: str | None) -> None:
    report = write_report(tmp_path / "report.json", model_report(folder))
    path = folder / "README.md"
    path.unlink()
    if card is not None:
        path.write_bytes(card.encode())
    config = (folder / "guard.json").read_bytes()
    result = run(folder, "--evaluation", report)
    assert result.exit_code == 2
    assert "<!-- figures -->" in result.stderr
    assert (folder / "guard.json").read_bytes() == config
    assert (path.read_bytes().decode() if path.exists() else None) == card


def test_a_folder_or_report_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--evaluation", write_report(tmp_path / "r.json", model_report(folder))).exit_code == 2
    junk = tmp_path / "junk.json"
    junk.write_text(json.dumps({"files": []}))
    assert run(folder, "--evaluation", junk).exit_code == 1
    write_config(folder, DetoxifierConfig(**COMMON))  # type: ignore[arg-type]
    result = run(folder, "--evaluation", tmp_path / "r.json")
    assert result.exit_code == 2
    assert "detoxifier" in result.stderr
