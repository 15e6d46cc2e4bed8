"""What cannot be loaded is refused with the cure, before it can judge anything."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_protector_guard import (
    CheckpointError,
    ConfigError,
    DetectorError,
    MissingDependencyError,
    Turn,
    load_detector,
    load_detoxifier,
)
from mllm_protector_guard.models.checkpoint import read_config
from models.tiny import (
    LlamaForSequenceClassification,
    chat_tokenizer,
    save_adapter,
    save_causal_lm,
    save_classifier,
    save_detector,
    save_official_detector,
)

TURN = Turn(question="planted", answer="planted too")
FOREIGN = {"device": "cpu", "polarity": "harmless", "template": "protector"}


def use(detector):
    return detector.score([TURN])


def change_weights(folder, change, name="adapter_model.safetensors"):
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name)


def change_config(folder, **fields):
    path = folder / "guard.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def ours(detector_folder, tmp_path):
    return shutil.copytree(detector_folder, tmp_path / "ours")


@pytest.fixture
def official(official_detector, tmp_path):
    return shutil.copytree(official_detector, tmp_path / "official")


class TestHeads:
    def test_a_language_model_is_no_detector(self, llama_lm):
        with pytest.raises(CheckpointError, match=r"score\.weight.*random"):
            use(load_detector(llama_lm, **FOREIGN))

    def test_an_adapter_without_its_head_is_no_detector(self, official, llama_lm):
        change_weights(official, lambda weights: [weights.pop(name) for name in list(weights) if "score" in name])
        with pytest.raises(CheckpointError, match=r"no classification head.*modules_to_save"):
            use(load_detector(official, base=llama_lm, **FOREIGN))

    def test_a_detector_needs_its_head_file(self, ours):
        (ours / "head.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"head\.safetensors.*copy"):
            use(load_detector(ours, device="cpu"))

    @pytest.mark.parametrize("width", [7, 64])
    def test_a_head_of_another_width_is_refused(self, ours, width):
        save_file({"weight": torch.zeros(1, width), "bias": torch.zeros(1)}, ours / "head.safetensors")
        with pytest.raises(CheckpointError, match=r"one-unit head on 32 features.*guard\.json"):
            use(load_detector(ours, device="cpu"))

    def test_a_classifier_is_no_detoxifier(self, tmp_path):
        folder = save_classifier(tmp_path / "c", chat_tokenizer())
        with pytest.raises(CheckpointError, match=r"causal language model.*load_detector"):
            load_detoxifier(folder, device="cpu", template="chatml").warm_up()

    def test_an_adapter_of_a_detector_is_no_detoxifier(self, official, llama_lm):
        with pytest.raises(CheckpointError, match="does not fit its base model"):
            load_detoxifier(official, device="cpu", base=llama_lm, template="protector").warm_up()


class TestAdapters:
    def test_another_rank_is_refused(self, official, llama_lm, tmp_path):
        other = save_official_detector(tmp_path / "r8", llama_lm, rank=8)
        shutil.copy(other / "adapter_model.safetensors", official)
        with pytest.raises(CheckpointError, match=r"base=.*rank"):
            use(load_detector(official, base=llama_lm, **FOREIGN))

    def test_another_architecture_is_refused(self, official, tmp_path):
        wider = save_causal_lm(tmp_path / "wide", chat_tokenizer(), hidden_size=64)
        with pytest.raises(CheckpointError, match="does not fit its base model"):
            use(load_detector(official, base=wider, **FOREIGN))

    def test_a_base_with_fewer_layers_is_refused(self, official, tmp_path):
        shallow = save_causal_lm(tmp_path / "shallow", chat_tokenizer(), layers=2)
        with pytest.raises(CheckpointError, match="does not fit its base model"):
            use(load_detector(official, base=shallow, **FOREIGN))

    @pytest.mark.parametrize("own", [True, False])
    def test_missing_weights_are_refused(self, ours, official, llama_lm, own):
        folder = ours if own else official
        change_weights(folder, lambda weights: weights.pop(next(name for name in weights if "layers.1" in name)))
        detector = load_detector(folder, device="cpu") if own else load_detector(folder, base=llama_lm, **FOREIGN)
        with pytest.raises(CheckpointError, match="does not fit its base model"):
            use(detector)

    def test_an_adapter_that_names_no_base_is_refused(self, official):
        config = json.loads((official / "adapter_config.json").read_text())
        (official / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
        with pytest.raises(ConfigError, match="give base="):
            load_detector(official, **FOREIGN)

    def test_a_damaged_configuration_is_refused(self, official):
        (official / "adapter_config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"adapter_config\.json.*Copy"):
            load_detector(official, **FOREIGN)

    def test_a_base_for_what_is_no_adapter_is_refused(self, llama_lm):
        with pytest.raises(ConfigError, match="base= is for LoRA"):
            load_detector(llama_lm, base=llama_lm, **FOREIGN)

    def test_several_labels_under_an_adapter_are_refused(self, llama_lm, tmp_path):
        model = LlamaForSequenceClassification.from_pretrained(llama_lm, num_labels=3)
        folder = save_adapter(tmp_path / "three", model, base_name="x", task_type="SEQ_CLS", modules_to_save=["score"])
        with pytest.raises(CheckpointError, match="does not fit its base model"):
            use(load_detector(folder, base=llama_lm, **FOREIGN))


class TestFiles:
    @pytest.mark.parametrize("name", ["head.safetensors", "adapter_model.safetensors"])
    def test_truncated_files_are_refused(self, ours, name):
        content = (ours / name).read_bytes()
        (ours / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError):
            use(load_detector(ours, device="cpu"))

    def test_a_truncated_base_is_refused(self, chat_lm, tmp_path):
        base = shutil.copytree(chat_lm, tmp_path / "base")
        content = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes(content[:-500])
        with pytest.raises(CheckpointError, match="damaged"):
            load_detoxifier(base, device="cpu", template="chatml").warm_up()

    def test_pickled_weights_are_never_read(self, chat_lm, official, llama_lm, tmp_path):
        base = shutil.copytree(chat_lm, tmp_path / "base")
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*weights_only=True.*safetensors"):
            load_detoxifier(base, device="cpu", template="chatml").warm_up()
        (official / "adapter_model.safetensors").rename(official / "adapter_model.bin")
        with pytest.raises(CheckpointError, match=r"adapter_model\.bin.*adapter_model\.safetensors"):
            use(load_detector(official, base=llama_lm, **FOREIGN))

    @pytest.mark.parametrize("damage", ["remove", "cut"])
    def test_a_missing_or_damaged_tokenizer_is_told(self, chat_lm, tmp_path, damage):
        base = shutil.copytree(chat_lm, tmp_path / "base")
        if damage == "remove":
            for path in base.glob("tokenizer*"):
                path.unlink()
        else:
            (base / "tokenizer.json").write_text('{"version": "1.0"}')
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            load_detoxifier(base, device="cpu", template="chatml").warm_up()

    def test_not_a_number_is_an_error(self, ours):
        change_weights(ours, lambda weights: weights["weight"].fill_(float("nan")), "head.safetensors")
        with pytest.raises(DetectorError, match="not a finite number") as caught:
            use(load_detector(ours, device="cpu"))
        assert "planted" not in str(caught.value)


class TestBases:
    def test_another_base_than_the_adapter_was_trained_on_is_refused(self, chat_lm, tmp_path):
        folder = save_detector(tmp_path / "d", chat_lm, reference={"name": str(chat_lm), "sha256": "0" * 64})
        with pytest.raises(CheckpointError, match=r"sha256.*guard\.json"):
            use(load_detector(folder, device="cpu"))

    def test_the_right_sha256_is_accepted(self, chat_lm, tmp_path):
        import hashlib

        sha256 = hashlib.sha256((chat_lm / "model.safetensors").read_bytes()).hexdigest()
        folder = save_detector(tmp_path / "d", chat_lm, reference={"name": str(chat_lm), "sha256": sha256})
        assert len(use(load_detector(folder, device="cpu"))) == 1

    def test_more_layers_than_the_base_has_are_refused(self, ours):
        change_config(ours, layers=9)
        with pytest.raises(CheckpointError, match=r"lacks \d+ weights.*guard\.json"):
            use(load_detector(ours, device="cpu"))


class TestGuardJson:
    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"planted": 1}, r"planted \(extra_forbidden\)"),
            ({"kind": "judge"}, "union_tag_invalid"),
            ({"threshold": 1.0}, "threshold"),
            ({"temperature": 0}, "temperature"),
            ({"pooling": "max"}, "pooling"),
            ({"schema_version": 2}, "schema_version"),
            ({"window_tokens": 64, "overlap_tokens": 64}, "value_error"),
        ],
    )
    def test_wrong_fields_are_named(self, ours, fields, named):
        change_config(ours, **fields)
        with pytest.raises(CheckpointError, match=named):
            load_detector(ours)

    def test_a_template_must_be_known(self, ours):
        change_config(ours, template="nope")
        with pytest.raises(ConfigError, match="'nope'"):
            load_detector(ours)

    @pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
    def test_a_damaged_file_is_refused(self, ours, content):
        (ours / "guard.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"guard\.json"):
            read_config(ours)

    def test_the_two_kinds_are_not_taken_for_each_other(self, detector_folder, detoxifier_folder):
        with pytest.raises(CheckpointError, match="is a detoxifier; use load_detoxifier"):
            load_detector(detoxifier_folder)
        with pytest.raises(CheckpointError, match="is a detector; use load_detector"):
            load_detoxifier(detector_folder)

    def test_what_the_file_says_cannot_be_said_again(self, detector_folder):
        with pytest.raises(ConfigError, match="leave out: polarity, template"):
            load_detector(detector_folder, polarity="harmful", template="chatml")


class TestSettings:
    def test_foreign_models_need_polarity_and_template(self, llama_lm):
        with pytest.raises(ConfigError, match="polarity= and template="):
            load_detector(llama_lm)
        with pytest.raises(ConfigError, match="say its template="):
            load_detoxifier(llama_lm)

    @pytest.mark.parametrize(
        "wrong", [{"polarity": "safe"}, {"threshold": 1.5}, {"threshold": 0.0}, {"template": "alpaca"}]
    )
    def test_wrong_values_are_named(self, llama_lm, wrong):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            load_detector(llama_lm, **{**FOREIGN, **wrong})

    @pytest.mark.parametrize("wrong", [{"device": "tpu9"}, {"device": "cpuu"}, {"dtype": "int3"}])
    def test_unknown_devices_and_dtypes_are_named(self, detector_folder, wrong):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} '{next(iter(wrong.values()))}'.*use 'auto'"):
            use(load_detector(detector_folder, **{"device": "cpu", **wrong}))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_an_absent_device_is_told(self, detector_folder):
        with pytest.raises(ConfigError, match=r"CUDA.*'cpu'"):
            use(load_detector(detector_folder, device="cuda"))

    @pytest.mark.parametrize("bits", ["8bit", "4bit"])
    def test_quantization_needs_cuda(self, detector_folder, bits):
        with pytest.raises(ConfigError, match=f"{bits}.*CUDA only"):
            use(load_detector(detector_folder, device="cpu", quantization=bits))

    def test_device_map_needs_accelerate(self, detector_folder, monkeypatch):
        monkeypatch.setattr("mllm_protector_guard.models.backbone.importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match="accelerate") as caught:
            use(load_detector(detector_folder, device="cpu", device_map="auto"))
        assert caught.value.extra == "train"


class TestNames:
    @pytest.mark.parametrize("name", ["nobody/nothing", "smollm2-1350m", "/no/such/folder", "a/b/c", ""])
    @pytest.mark.parametrize("load", [load_detector, load_detoxifier])
    def test_unknown_names_are_refused_quickly(self, load, name):
        with pytest.raises(CheckpointError, match=r"smollm2-135m.*spelling.*network"):
            load(name)

    def test_offline_nothing_is_asked_for(self, monkeypatch):
        asked = []

        def snapshot_download(source, **given):
            asked.append(given["local_files_only"])
            raise OSError

        monkeypatch.setattr("mllm_protector_guard.models.backbone.snapshot_download", snapshot_download)
        for offline, given in (("1", None), ("1", False), ("0", True), ("", None)):
            monkeypatch.setenv("MLLM_PROTECTOR_OFFLINE", offline)
            with pytest.raises(CheckpointError):
                load_detector("nobody/nothing", local_files_only=given)
        assert asked == [True, True, True, False]

    def test_a_base_that_is_not_pulled_names_the_command(self, chat_lm, tmp_path, monkeypatch):
        monkeypatch.setenv("MLLM_PROTECTOR_HOME", str(tmp_path / "home"))
        folder = save_detector(tmp_path / "d", chat_lm, reference={"name": "smollm2-135m"})
        with pytest.raises(CheckpointError, match="mllm-protector pull smollm2-135m"):
            use(load_detector(folder, device="cpu"))


def test_errors_of_a_check_hold_no_text(ours, caplog):
    (ours / "head.safetensors").unlink()
    with caplog.at_level(logging.DEBUG), pytest.raises(CheckpointError) as caught:
        use(load_detector(ours, device="cpu"))
    assert "planted" not in f"{caught.value} {caught.value.__cause__} {caplog.text}"
