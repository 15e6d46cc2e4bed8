"""The calibrated copy of a checkpoint: whole, loadable, and never in the place of something else."""

import datetime
import errno
import json
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

import mllm_protector_guard
from mllm_protector_guard import CheckpointError, ConfigError, Guard, GuardPolicy, Turn, load_detector
from mllm_protector_guard.models.checkpoint import CalibrationRecord, read_config, write_config
from mllm_protector_guard.training.calibrated_copy import (
    calibrated,
    detector_folder,
    read_detector_config,
    require_free,
    write_copy,
)

RECORD = CalibrationRecord(
    bound="clopper-pearson",
    max_fpr=0.01,
    confidence=0.95,
    safe_rows=300,
    safe_flagged=0,
    safe_sha256=("a" * 64,),
    date=datetime.date(2030, 1, 2),
)
TURNS = [Turn(question="What now?", answer=text) for text in ("Bake bread.", "The cat is in the garden.", "Mild salt")]


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    from models.tiny import save_detector

    metrics = {"held_out": {"f1": 0.8, "auroc": 0.9, "fpr": 0.1}, "benign": {"fpr": 0.1}}
    folder = save_detector(tmp_path_factory.mktemp("copy") / "detector", base, temperature=2.0, metrics=metrics)
    (folder / "README.md").write_text("# A detector\n\nF1 0.8\n")
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("kept")
    return folder


@pytest.fixture
def config(checkpoint):
    return calibrated(read_detector_config(checkpoint), threshold=0.7, factor=1.5, record=RECORD)


def contents(folder: Path):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_copy_loads_and_brings_its_threshold_into_a_guard(checkpoint, config, tmp_path):
    import numpy as np

    before = contents(checkpoint)
    write_copy(checkpoint, tmp_path / "new" / "copy", config, force=False)
    detector = load_detector(tmp_path / "new" / "copy", device="cpu")
    assert Guard(detector=detector, policy=GuardPolicy(on_harm="flag")).threshold == 0.7
    old, new = np.array(load_detector(checkpoint, device="cpu").score(TURNS)), np.array(detector.score(TURNS))
    assert np.log(new / (1 - new)) == pytest.approx(np.log(old / (1 - old)) / 1.5, rel=1e-3)
    assert contents(checkpoint) == before
    assert set(contents(tmp_path / "new" / "copy")) == set(before)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


def test_guard_json_says_what_was_done(checkpoint, config, tmp_path):
    write_copy(checkpoint, tmp_path / "copy", config, force=False)
    read = read_config(tmp_path / "copy")
    assert read == config
    assert (read.temperature, read.threshold) == (3.0, 0.7)
    assert read.calibration == RECORD
    assert read.revision.startswith("0+calibrated.")
    assert read.metrics == {"held_out": {"auroc": 0.9}}
    assert json.loads((tmp_path / "copy" / "guard.json").read_text())["calibration"]["date"] == "2030-01-02"


def test_the_card_says_it_once_however_often_it_is_calibrated(checkpoint, config, tmp_path):
    write_copy(checkpoint, tmp_path / "copy", config, force=False)
    again = calibrated(config, threshold=0.8, factor=1.0, record=RECORD)
    write_copy(tmp_path / "copy", tmp_path / "again", again, force=False)
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.startswith("# A detector\n\nF1 0.8\n\n## Calibration of this copy\n")
    assert card.count("## Calibration") == card.count("calibrated.") == 1
    assert again.revision != config.revision
    assert again.revision.count("+calibrated.") == 1


def test_a_read_only_original_can_be_copied(checkpoint, config, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "original")
    (tmp_path / "original" / "guard.json").chmod(0o444)
    write_copy(tmp_path / "original", tmp_path / "copy", config, force=False)
    assert read_config(tmp_path / "copy") == config
    assert (tmp_path / "copy" / "guard.json").stat().st_mode & 0o200


class TestPlace:
    def test_what_is_there_stays_without_force(self, checkpoint, config, tmp_path):
        (tmp_path / "kept.txt").write_text("precious")
        with pytest.raises(ConfigError, match="exists; give another --output, or --force"):
            write_copy(checkpoint, tmp_path, config, force=False)
        with pytest.raises(ConfigError, match=r"holds no guard\.json, and --force replaces checkpoints only"):
            write_copy(checkpoint, tmp_path, config, force=True)
        assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]

    def test_force_replaces_a_checkpoint_whole(self, checkpoint, config, tmp_path):
        write_copy(checkpoint, tmp_path / "copy", config, force=False)
        (tmp_path / "copy" / "stale.txt").write_text("old")
        newer = calibrated(config, threshold=0.9, factor=1.0, record=RECORD)
        write_copy(checkpoint, tmp_path / "copy", newer, force=True)
        assert read_config(tmp_path / "copy") == newer
        assert not (tmp_path / "copy" / "stale.txt").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]

    def test_an_empty_folder_and_what_a_killed_run_left_are_no_obstacle(self, checkpoint, config, tmp_path):
        (tmp_path / "copy").mkdir()
        (tmp_path / ".copy.part").mkdir()
        (tmp_path / ".copy.part" / "half").write_text("half")
        write_copy(checkpoint, tmp_path / "copy", config, force=False)
        assert set(contents(tmp_path / "copy")) == set(contents(checkpoint))

    def test_a_copy_that_fails_leaves_what_was_there(self, checkpoint, config, tmp_path, monkeypatch):
        write_copy(checkpoint, tmp_path / "copy", config, force=False)
        left = iter([None, None])

        def copy_two_files(source, target):
            if next(left, "full") == "full":
                raise OSError(errno.ENOSPC, "full")
            Path(target).write_bytes(Path(source).read_bytes())

        monkeypatch.setattr(shutil, "copyfile", copy_two_files)
        with pytest.raises(OSError, match="full"):
            write_copy(checkpoint, tmp_path / "copy", config, force=True)
        assert set(contents(tmp_path / "copy")) == set(contents(checkpoint))
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]

    def test_the_original_is_never_the_place(self, checkpoint, tmp_path):
        for place in (checkpoint, checkpoint / "inside", checkpoint.parent):
            with pytest.raises(ConfigError, match="overlap"):
                require_free(checkpoint, place, force=True)
        link = tmp_path / "link"
        link.symlink_to(checkpoint, target_is_directory=True)
        with pytest.raises(ConfigError, match="overlap"):
            require_free(checkpoint, link, force=True)

    def test_nor_is_the_installed_package(self, checkpoint):
        with pytest.raises(ConfigError, match="installed package"):
            require_free(checkpoint, Path(mllm_protector_guard.__file__).parent / "models" / "mine", force=True)


class TestFolder:
    def test_only_checkpoints_of_ours_have_one(self, checkpoint, base):
        assert detector_folder(str(checkpoint), local_files_only=True) == checkpoint
        assert detector_folder("smollm2-135m", local_files_only=True).name == "detector"
        assert detector_folder(str(base), local_files_only=True) is None
        assert detector_folder("package.module:detector", local_files_only=True) is None

    def test_what_is_not_there_is_an_error(self, tmp_path):
        with pytest.raises(CheckpointError, match="neither"):
            detector_folder(str(tmp_path / "missing"), local_files_only=True)

    def test_a_detoxifier_is_an_error(self, base, tmp_path):
        from models.tiny import save_detoxifier

        with pytest.raises(CheckpointError, match="detoxifier"):
            read_detector_config(save_detoxifier(tmp_path / "detoxifier", base))


class TestRecord:
    def test_it_is_strict(self):
        fields = RECORD.model_dump(mode="json")
        assert CalibrationRecord.model_validate_json(json.dumps(fields)) == RECORD
        for wrong in ({"note": "x"}, {"bound": "hope"}, {"max_fpr": 1.0}, {"safe_sha256": ["abc"]}):
            with pytest.raises(ValidationError):
                CalibrationRecord.model_validate({**fields, **wrong})

    def test_a_guard_json_without_it_is_still_read(self, checkpoint, tmp_path):
        fields = json.loads((checkpoint / "guard.json").read_text())
        fields.pop("calibration", None)
        (tmp_path / "guard.json").write_text(json.dumps(fields))
        assert read_config(tmp_path).calibration is None
        write_config(tmp_path, read_config(tmp_path))
        assert read_config(tmp_path).calibration is None
