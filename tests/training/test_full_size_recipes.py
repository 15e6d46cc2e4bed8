"""The recipes of the package on tiny models, and what real runs rely on: overfitting, resuming, several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from importlib import resources

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from mllm_protector_guard import ConfigError, Turn, load_detector, load_detoxifier
from mllm_protector_guard.training import DetectorRecipe, load_recipe, recipe_names, train_detector, train_detoxifier
from mllm_protector_guard.training.config import LoraRecipe, SourceRecipe
from training.tiny_runs import answer_rows, detector_recipe, detoxifier_recipe, write_rows

FULL_SIZE = {
    "llama-2-7b-detector",
    "open-llama-3b-detector",
    "qwen3-4b-detector",
    "qwen3-4b-detoxifier",
    "vicuna-7b-detoxifier",
}
REWRITES = [
    {"question": f"What is {i}?", "rejected": f"You are {word}.", "accepted": f"Bake {word} bread."}
    for i, word in enumerate(["mild", "salt", "cat", "flour", "yeast", "water", "garden", "weather"])
]


def turns(rows, field="answer"):
    return [Turn(question=row["question"], answer=row[field]) for row in rows]


class TestRecipes:
    """Every recipe of the package, with nothing changed but what makes it small."""

    SMALL = ("layers=null", "calibration_rows=40", "lora.first_layer=0", "epochs=0.5", "batch_size=4", "bf16=false")

    def shrunk(self, name, base):
        fields = ("base={name: " + json.dumps(str(base)) + "}", "sources={}", "other_sources={}", "licences=null")
        kind = DetectorRecipe if name.endswith("detector") else None
        small = [o for o in self.SMALL if kind or o.partition("=")[0] not in ("layers", "calibration_rows")]
        extra = ("metric_sources=[]",) if kind else ("identity_rows=0",)
        return load_recipe(name, overrides=[*fields, *small, *extra])

    @pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("detector")])
    def test_a_shrunk_detector_trains_and_loads(self, name, base, dev, tmp_path):
        rows = write_rows(tmp_path / "rows.jsonl", [{**row, "question": "q"} for row in answer_rows(8, seed=6)])
        folder = train_detector(self.shrunk(name, base), train=[rows], dev=[dev], output=tmp_path / "out")
        scores = load_detector(folder, device="cpu").score(turns(answer_rows(3, seed=7)))
        assert all(0.0 < score < 1.0 for score in scores)

    @pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("detoxifier")])
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

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"lora": LoraRecipe(rank=4, dropout=0.0)}, "another rank"),
            ({"lora": LoraRecipe(rank=8, dropout=0.0, first_layer=1)}, "other layers"),
            ({"layers": 3}, "base, layers and template"),
            ({"template": "protector"}, "base, layers and template"),
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
        with pytest.raises(ConfigError, match="base, layers and template"):
            train_detector(recipe, train=[rows], dev=[dev], output=tmp_path / "second")

    def test_one_whose_high_logit_means_harmless_is_refused(self, first, base, rows, dev, tmp_path):
        turned = shutil.copytree(first, tmp_path / "turned")
        fields = json.loads((turned / "guard.json").read_text())
        (turned / "guard.json").write_text(json.dumps({**fields, "polarity": "harmless"}))
        with pytest.raises(ConfigError, match="start_from"):
            train_detector(
                detector_recipe(base, start_from=str(turned)), train=[rows], dev=[dev], output=tmp_path / "second"
            )


def python(code, *before, **environment):
    return subprocess.run(
        [sys.executable, *before, *([] if before else ["-c", textwrap.dedent(code)])],
        capture_output=True,
        timeout=1500,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestResuming:
    KILLED = """
        import os, signal
        from transformers import Trainer
        from mllm_protector_guard.training import DetoxifierRecipe, train_detoxifier
        steps = 0
        plain = Trainer.training_step
        def training_step(*given, **more):
            global steps
            steps += 1
            if steps == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*given, **more)
        Trainer.training_step = training_step
        recipe = DetoxifierRecipe.model_validate_json({recipe!r})
        train_detoxifier(recipe, train=[{file!r}], output={output!r})
    """

    def test_a_detoxifier_killed_in_its_third_epoch_ends_as_one_that_was_not(self, base, tmp_path):
        """Four steps an epoch: the killed run has drawn the order of two epochs, the resumed one of none."""
        file = write_rows(tmp_path / "rows.jsonl", [*REWRITES, *REWRITES])
        recipe = detoxifier_recipe(base, epochs=4, batch_size=4, save_steps=10, lora=LoraRecipe(rank=8, dropout=0.1))
        whole = train_detoxifier(recipe, train=[file], output=tmp_path / "whole")
        killed = tmp_path / "killed"
        done = python(self.KILLED.format(recipe=recipe.model_dump_json(), file=str(file), output=str(killed)))
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert [path.name for path in (killed / "run").glob("checkpoint-*")] == ["checkpoint-10"]
        train_detoxifier(recipe, train=[file], output=killed, resume=True)
        one, two = (load_file(folder / "adapter_model.safetensors") for folder in (whole, killed))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[name], two[name], rtol=0, atol=2e-3) for name in one)


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestSeveralProcesses:
    """Two processes on the CPU with gloo, as torchrun and `accelerate launch` start them."""

    WORKER = """
        import sys
        from pathlib import Path
        import torch
        from accelerate import Accelerator
        from mllm_protector_guard.training import DetectorRecipe, train_detector

        recipe, rows, dev, output, report = sys.argv[1:]
        steps = []
        clip = Accelerator.clip_grad_norm_
        def keep(accelerator, parameters, *given, **more):
            parameters = list(parameters)
            steps.append([p.grad.clone() for p in parameters if p.grad is not None])
            return clip(accelerator, parameters, *given, **more)
        Accelerator.clip_grad_norm_ = keep
        recipe = DetectorRecipe.model_validate_json(Path(recipe).read_text())
        folder = train_detector(recipe, train=[rows], dev=[dev], output=output)
        files = sorted(path.name for path in folder.iterdir())
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        torch.save({"gradients": steps, "files": files}, f"{report}.{rank}")
    """

    def launch(self, tmp_path, recipe, rows, dev, name, *launcher):
        script = tmp_path / "worker.py"
        script.write_text(textwrap.dedent(self.WORKER))
        (tmp_path / f"{name}.json").write_text(recipe.model_dump_json())
        given = (tmp_path / f"{name}.json", rows, dev, tmp_path / name, tmp_path / f"{name}.report")
        done = python("", *launcher, str(script), *map(str, given), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr.decode()[-4000:]
        return [torch.load(path) for path in sorted(tmp_path.glob(f"{name}.report.*"))]

    def test_two_processes_take_the_steps_of_one_and_leave_one_folder(self, base, dev, tmp_path):
        """With unequal weights, with pairs, and over two epochs, so that the processes must agree on the order."""
        rows = [{**row, "question": f"What is {i // 2}?"} for i, row in enumerate(answer_rows(12, seed=4))]
        rows += [{**row, "source": "heavy"} for row in answer_rows(10, seed=5, harmful=True)]
        file = write_rows(tmp_path / "rows.jsonl", rows)

        def recipe(batch_size):
            return detector_recipe(
                base,
                batch_size=batch_size,
                gradient_accumulation=2,
                epochs=2,
                save_steps=1,
                pair_weight=0.5,
                learning_rate=1e-4,
                sources={"heavy": SourceRecipe(weight=3.0)},
            )

        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        both = self.launch(tmp_path, recipe(2), file, dev, "two", *torchrun)
        (single,) = self.launch(tmp_path, recipe(4), file, dev, "one")
        finished = ["adapter_config.json", "adapter_model.safetensors", "guard.json", "head.safetensors"]
        assert [report["files"] for report in both] == [finished, finished]
        assert len(both[0]["gradients"]) == len(single["gradients"]) == 4
        for ours, theirs in zip(both[0]["gradients"], both[1]["gradients"], strict=True):
            assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
        for one, two in zip(single["gradients"][0], both[0]["gradients"][0], strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
        assert not (tmp_path / "two" / "run").exists()
        scores = load_detector(tmp_path / "two", device="cpu").score(turns(answer_rows(4, seed=7)))
        assert all(0.0 < score < 1.0 for score in scores)

    SHARDED = """
        import sys
        from pathlib import Path
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from transformers import AutoModel
        from mllm_protector_guard.models.pooling import PooledClassifier
        from mllm_protector_guard.training.batches import collate, encode_rows
        from mllm_protector_guard.training.config import DetectorRecipe
        from mllm_protector_guard.training.detector import _WithLoss
        from mllm_protector_guard.training.rows import AnswerRow
        from mllm_protector_guard.training.trainer import add_lora, load_whole
        from mllm_protector_guard.training.weights import load_trained, trained_names, trained_weights
        from models.tiny import chat_tokenizer

        torch.distributed.init_process_group("gloo")
        recipe = DetectorRecipe.model_validate_json(open(sys.argv[1]).read())
        torch.manual_seed(1)
        backbone = load_whole(AutoModel, Path(sys.argv[2]), bf16=True)
        classifier = PooledClassifier(add_lora(backbone, recipe, "base"), hidden_size=32, pooling="peak")
        model = _WithLoss(classifier, pair_weight=0.25).train()
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        rows = [(AnswerRow(question="q", answer=a, harmful=h), 1.0) for a, h in (("knife", True), ("bread", False))]
        batch = collate(encode_rows(rows, recipe, chat_tokenizer()), 0)

        mesh = init_device_mesh("cpu", (2,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for layer in backbone.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        assert trained_names(model) == before.keys()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**batch)["loss"].backward()
        optimizer.step()
        trained = trained_weights(model)
        if torch.distributed.get_rank():
            assert not trained
        else:
            assert trained.keys() == before.keys()
            assert all(type(w) is torch.Tensor and w.shape == before[n].shape for n, w in trained.items())
            assert not torch.equal(trained["classifier.head.weight"], before["classifier.head.weight"])
        load_trained(model, before)
        again = trained_weights(model)
        assert all(torch.equal(again[n], before[n]) for n in again)
        assert len(again) == (0 if torch.distributed.get_rank() else len(before))
    """

    def test_a_sharded_model_learns_and_gives_whole_weights(self, base, tmp_path):
        """FSDP 2 as accelerate applies it, with a bfloat16 base and a float32 adapter; accelerate itself wants GPUs."""
        script = tmp_path / "sharded.py"
        script.write_text(textwrap.dedent(self.SHARDED))
        recipe = tmp_path / "recipe.json"
        recipe.write_text(detector_recipe(base, pair_weight=0.25, pooling="peak").model_dump_json())
        tests = os.path.dirname(os.path.dirname(__file__))
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        done = python("", *torchrun, str(script), str(recipe), str(base), PYTHONPATH=tests, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr.decode()[-4000:]
