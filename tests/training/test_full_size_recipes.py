"""The recipes of the package on tiny models, and what real runs rely on: overfitting, resuming, several processes."""

import json
import shutil
from importlib import resources

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from pydantic import ValidationError
from safetensors.torch import load_file

from mllm_protector_guard import ConfigError, load_detector, load_detoxifier
from mllm_protector_guard.training import DetectorRecipe, load_recipe, recipe_names, train_detector, train_detoxifier
from mllm_protector_guard.training.config import LoraRecipe
from training.tiny_runs import REWRITES, answer_rows, detector_recipe, detoxifier_recipe, turns, write_rows

FULL_SIZE = {
    "llama-2-7b-detector",
    "open-llama-3b-detector",
    "qwen3-4b-detector",
    "qwen3-4b-detoxifier",
    "vicuna-7b-detoxifier",
}


class TestRecipes:
    """Every recipe of the package, with nothing changed but what makes it small."""

    SMALL = ("layers=null", "calibration_rows=40", "lora.first_layer=0", "epochs=0.5", "batch_size=4", "bf16=false")

    def shrunk(self, name, base):
        fields = ("base={name: " + json.dumps(str(base)) + "}", "sources={}", "other_sources={}", "licences=null")
        fields += ("start_from=null",)
        kind = DetectorRecipe if "-detector" in name else None
        small = [o for o in self.SMALL if kind or o.partition("=")[0] not in ("layers", "calibration_rows")]
        extra = ("metric_sources=[]", "start_share=0") if kind else ("identity_rows=0",)
        return load_recipe(name, overrides=[*fields, *small, *extra])

    @pytest.mark.parametrize("name", [name for name in recipe_names() if "-detector" in name])
    def test_a_shrunk_detector_trains_and_loads(self, name, base, dev, tmp_path):
        rows = write_rows(tmp_path / "rows.jsonl", [{**row, "question": "q"} for row in answer_rows(8, seed=6)])
        folder = train_detector(self.shrunk(name, base), train=[rows], dev=[dev], output=tmp_path / "out")
        scores = load_detector(folder, device="cpu").score(turns(answer_rows(3, seed=7)))
        assert all(0.0 < score < 1.0 for score in scores)

    @pytest.mark.parametrize("name", [name for name in recipe_names() if "-detoxifier" in name])
    def test_a_shrunk_detoxifier_trains_and_loads(self, name, base, tmp_path):
        rows = write_rows(tmp_path / "rows.jsonl", REWRITES)
        folder = train_detoxifier(self.shrunk(name, base), train=[rows], output=tmp_path / "out")
        assert load_detoxifier(folder, device="cpu")._ready()

    def test_these_are_there(self):
        assert set(recipe_names()) >= FULL_SIZE

    @pytest.mark.parametrize("name", ["open-llama-3b-detector", "llama-2-7b-detector", "vicuna-7b-detoxifier"])
    def test_the_papers_settings(self, name):
        recipe = load_recipe(name)
        assert (recipe.template, recipe.learning_rate, recipe.epochs) == ("protector", 2e-5, 4)
        assert (recipe.lora.alpha, recipe.lora.modules) == (32, ("q_proj", "v_proj"))
        assert recipe.batch_size * recipe.gradient_accumulation == 8
        if isinstance(recipe, DetectorRecipe):
            assert recipe.max_question_tokens + recipe.max_answer_tokens == 512
            assert (recipe.lora.rank, recipe.pooling, recipe.pair_weight) == (32, "last", 0.25)
        else:
            assert recipe.max_question_tokens + recipe.max_answer_tokens + recipe.max_rewrite_tokens <= 512
            assert recipe.lora.rank == 128


class TestLaunchFiles:
    FOLDER = resources.files("mllm_protector_guard.training") / "accelerate"

    @pytest.mark.parametrize("name", ["fsdp.yaml", "deepspeed-zero2.yaml"])
    def test_accelerate_reads_them(self, name):
        fields = yaml.safe_load((self.FOLDER / name).read_text(encoding="utf-8"))
        read = load_config_from_file(str(self.FOLDER / name))
        assert read.fsdp_config == fields.get("fsdp_config", {})
        assert read.deepspeed_config == fields.get("deepspeed_config", {})
        assert read.mixed_precision == "bf16"

    def test_fsdp_gets_the_settings_that_the_training_needs(self, monkeypatch):
        from accelerate.utils import FullyShardedDataParallelPlugin

        for key, value in yaml.safe_load((self.FOLDER / "fsdp.yaml").read_text())["fsdp_config"].items():
            name = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}.get(key, key.upper())
            monkeypatch.setenv(name, str(value).lower() if isinstance(value, bool) else str(value))
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
        assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]


class TestOverfitting:
    """Eight rows with one label each, learned by heart."""

    @pytest.mark.parametrize("pooling", ["mean", "last", "peak"])
    def test_a_detector_classifies_all(self, base, tmp_path, pooling, capfd):
        rows = answer_rows(8, seed=8)
        file = write_rows(tmp_path / "rows.jsonl", rows)
        recipe = detector_recipe(base, epochs=30, pooling=pooling, peak_tokens=4)
        folder = train_detector(recipe, train=[file], dev=[file], output=tmp_path / "out")
        scores = load_detector(folder, device="cpu").score(turns(rows))
        assert [score >= 0.5 for score in scores] == [row["harmful"] for row in rows]
        losses = logged_losses(capfd.readouterr().out)
        assert losses[-1] < 0.5 * losses[0]

    def test_a_detoxifier_says_them_by_heart(self, base, tmp_path, capfd):
        file = write_rows(tmp_path / "rows.jsonl", REWRITES)
        recipe = detoxifier_recipe(base, epochs=40, batch_size=8)
        folder = train_detoxifier(recipe, train=[file], output=tmp_path / "out")
        rewrites = load_detoxifier(folder, device="cpu", max_new_tokens=24).rewrite(turns(REWRITES, "rejected"))
        assert rewrites == [row["accepted"] for row in REWRITES]
        losses = logged_losses(capfd.readouterr().out)
        assert losses[-1] < 0.1 * losses[0]


def logged_losses(text):
    """The losses that the Trainer printed, first to last."""
    lines = [line.replace("'", '"') for line in text.splitlines() if line.strip().startswith("{'loss'")]
    return [float(json.loads(line)["loss"]) for line in lines]


@pytest.fixture(scope="module")
def first(base, rows, dev, tmp_path_factory):
    output = tmp_path_factory.mktemp("first") / "detector"
    return train_detector(detector_recipe(base, epochs=1), train=[rows], dev=[dev], output=output)


class TestStartingFromADetector:
    def test_almost_no_training_keeps_its_scores(self, first, base, rows, dev, tmp_path):
        recipe = detector_recipe(base, start_from=str(first), learning_rate=1e-12, epochs=0.1, seed=99)
        second = train_detector(recipe, train=[rows], dev=[dev], output=tmp_path / "second")
        for file in ("adapter_model.safetensors", "head.safetensors"):
            before, after = load_file(first / file), load_file(second / file)
            assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-6) for name in before)

    def test_a_share_of_the_start_gives_a_mean_of_both(self, first, base, rows, dev, tmp_path):
        folders = {}
        for share in (0.0, 0.25):
            recipe = detector_recipe(base, start_from=str(first), start_share=share, epochs=1, seed=99)
            folders[share] = train_detector(recipe, train=[rows], dev=[dev], output=tmp_path / str(share))
        for file in ("adapter_model.safetensors", "head.safetensors"):
            start, trained, mean = (load_file(folder / file) for folder in (first, folders[0.0], folders[0.25]))
            assert any(not torch.allclose(start[name], trained[name], rtol=0, atol=1e-3) for name in start)
            for name, weight in mean.items():
                wanted = 0.25 * start[name].float() + 0.75 * trained[name].float()
                assert torch.allclose(weight.float(), wanted, rtol=2e-3, atol=1e-4)

    def test_a_share_needs_a_start(self, base):
        with pytest.raises(ValidationError, match="start_share needs start_from"):
            detector_recipe(base, start_share=0.5)

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"lora": LoraRecipe(rank=4, dropout=0.0)}, "another rank"),
            ({"lora": LoraRecipe(rank=8, dropout=0.0, first_layer=1)}, "other layers"),
            ({"layers": 3}, "layers or another polarity"),
            ({"template": "protector"}, "base and template"),
        ],
        ids=["rank", "adapted layers", "layers", "template"],
    )
    def test_it_must_fit_the_recipe(self, first, base, rows, dev, tmp_path, fields, named):
        recipe = detector_recipe(base, **{"start_from": str(first), **fields})
        with pytest.raises(ConfigError, match=named):
            train_detector(recipe, train=[rows], dev=[dev], output=tmp_path / "second")

    def test_another_base_of_the_same_shape_is_refused(self, first, base, rows, dev, tmp_path):
        other = shutil.copytree(base, tmp_path / "other")
        recipe = detector_recipe(other, start_from=str(first))
        with pytest.raises(ConfigError, match="base and template"):
            train_detector(recipe, train=[rows], dev=[dev], output=tmp_path / "second")

    def test_one_whose_high_logit_means_harmless_is_refused(self, first, base, rows, dev, tmp_path):
        turned = shutil.copytree(first, tmp_path / "turned")
        fields = json.loads((turned / "guard.json").read_text())
        (turned / "guard.json").write_text(json.dumps({**fields, "polarity": "harmless"}))
        with pytest.raises(ConfigError, match="start_from"):
            train_detector(
                detector_recipe(base, start_from=str(turned)), train=[rows], dev=[dev], output=tmp_path / "second"
            )
