"""Training in processes of its own: killed and gone on with, and several together."""

import signal
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from mllm_protector_guard import load_detector
from mllm_protector_guard.training import train_detoxifier
from mllm_protector_guard.training.config import LoraRecipe, SourceRecipe
from training.tiny_processes import python
from training.tiny_runs import REWRITES, answer_rows, detector_recipe, detoxifier_recipe, turns, write_rows


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestResuming:
    KILLED = """
        from mllm_protector_guard.training import DetoxifierRecipe, train_detoxifier
        from training.tiny_processes import kill_in_step
        kill_in_step(12)
        recipe = DetoxifierRecipe.model_validate_json({recipe!r})
        train_detoxifier(recipe, train=[{file!r}], output={output!r})
    """

    def test_a_detoxifier_killed_in_its_third_epoch_ends_as_one_that_was_not(self, base, tmp_path):
        """Four steps an epoch: the killed run has drawn the order of two epochs, the resumed one of none."""
        file = write_rows(tmp_path / "rows.jsonl", [*REWRITES, *REWRITES])
        recipe = detoxifier_recipe(base, epochs=4, batch_size=4, save_steps=10, lora=LoraRecipe(rank=8, dropout=0.1))
        whole = train_detoxifier(recipe, train=[file], output=tmp_path / "whole")
        killed = tmp_path / "killed"
        code = self.KILLED.format(recipe=recipe.model_dump_json(), file=str(file), output=str(killed))
        done = python("-c", textwrap.dedent(code))
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
        from mllm_protector_guard.training import DetectorRecipe, train_detector
        from training.tiny_processes import keep_gradients

        recipe, rows, dev, output, report = sys.argv[1:]
        steps = keep_gradients()
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
        done = python(*launcher, str(script), *map(str, given), OMP_NUM_THREADS="1")
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
        from mllm_protector_guard.training.adapters import add_lora, load_whole
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
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        done = python(*torchrun, str(script), str(recipe), str(base), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr.decode()[-4000:]
