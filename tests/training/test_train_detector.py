"""Training of detectors on tiny models: it learns, calibrates, and can be gone on with after a kill."""

import json
import signal
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from mllm_protector_guard import ConfigError, DataError, Turn, load_detector
from mllm_protector_guard.models.checkpoint import read_config
from mllm_protector_guard.models.pooling import PooledClassifier
from mllm_protector_guard.training import train_detector
from mllm_protector_guard.training.batches import collate, encode_rows
from mllm_protector_guard.training.config import LoraRecipe
from mllm_protector_guard.training.detector import _WithLoss, calibrated, calibration_rows
from mllm_protector_guard.training.rows import AnswerRow
from models.tiny import chat_tokenizer
from training.tiny_processes import python
from training.tiny_runs import HARMFUL_WORD, answer_rows, detector_recipe, write_rows

WEIGHTS = ("adapter_model.safetensors", "head.safetensors")


def weights(folder):
    return {f"{file}:{name}": w for file in WEIGHTS for name, w in load_file(folder / file).items()}


def same(first, second, tolerance=0.0):
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(
        torch.allclose(one[name], two[name], rtol=0, atol=tolerance) for name in one
    )


@pytest.fixture(scope="module")
def trained(base, rows, dev, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "detector"
    return train_detector(detector_recipe(base), train=[rows], dev=[dev], output=output)


class TestLearning:
    def test_scores_separate_and_the_threshold_lies_between(self, trained):
        detector = load_detector(trained, device="cpu")
        fresh = answer_rows(20, seed=9)
        scores = detector.score([Turn(question=row["question"], answer=row["answer"]) for row in fresh])
        bad = [score for score, row in zip(scores, fresh, strict=True) if row["harmful"]]
        good = [score for score, row in zip(scores, fresh, strict=True) if not row["harmful"]]
        assert min(bad) > max(good)
        assert sum(score >= detector.threshold for score in bad) >= 9
        assert sum(score >= detector.threshold for score in good) <= 1

    def test_the_folder_holds_a_checkpoint_and_nothing_else(self, trained, base):
        assert {path.name for path in trained.iterdir()} == {*WEIGHTS, "adapter_config.json", "guard.json"}
        config = read_config(trained)
        assert (config.layers, config.base.name, config.polarity) == (2, str(base), "harmful")
        assert config.temperature != 1.0
        adapter = json.loads((trained / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(base)

    def test_the_same_seed_gives_the_same_weights_and_another_others(self, base, rows, dev, tmp_path):
        given = {"train": [rows], "dev": [dev]}
        short = {"epochs": 0.5}
        first = train_detector(detector_recipe(base, **short), output=tmp_path / "1", **given)
        again = train_detector(detector_recipe(base, **short), output=tmp_path / "2", **given)
        other = train_detector(detector_recipe(base, seed=4, **short), output=tmp_path / "3", **given)
        assert same(first, again)
        assert not same(first, other, tolerance=1e-2)

    def test_gradient_checkpointing_changes_nothing_else(self, base, rows, dev, tmp_path):
        folders = [
            train_detector(
                detector_recipe(base, epochs=0.25, gradient_checkpointing=on),
                train=[rows],
                dev=[dev],
                output=tmp_path / str(on),
            )
            for on in (False, True)
        ]
        assert same(*folders, tolerance=2e-3)


class TestResuming:
    def test_a_killed_run_ends_as_one_that_was_not(self, base, rows, dev, tmp_path):
        recipe = detector_recipe(base, epochs=2, save_steps=5)
        whole = train_detector(recipe, train=[rows], dev=[dev], output=tmp_path / "whole")
        killed = tmp_path / "killed"
        code = f"""
            from mllm_protector_guard.training import DetectorRecipe, train_detector
            from training.tiny_processes import kill_in_step
            kill_in_step(9)
            recipe = DetectorRecipe.model_validate_json({recipe.model_dump_json()!r})
            train_detector(recipe, train=[{str(rows)!r}], dev=[{str(dev)!r}], output={str(killed)!r})
        """
        done = python("-c", textwrap.dedent(code))
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert [path.name for path in (killed / "run").glob("checkpoint-*")] == ["checkpoint-5"]
        assert not (killed / "guard.json").exists()
        # What a kill in the middle of a save leaves behind must not be taken for a checkpoint.
        (killed / "run" / "checkpoint-8").mkdir()
        with pytest.raises(ConfigError, match="unfinished run"):
            train_detector(recipe, train=[rows], dev=[dev], output=killed)
        train_detector(recipe, train=[rows], dev=[dev], output=killed, resume=True)
        assert same(whole, killed, tolerance=2e-3)
        assert read_config(killed).threshold == pytest.approx(read_config(whole).threshold, abs=1e-3)

    def test_a_finished_folder_is_not_written_again(self, trained, base, rows, dev):
        before = {path.name: path.read_bytes() for path in trained.iterdir()}
        with pytest.raises(ConfigError, match="already holds a checkpoint"):
            train_detector(detector_recipe(base), train=[rows], dev=[dev], output=trained)
        assert train_detector(detector_recipe(base), train=[rows], dev=[dev], output=trained, resume=True) == trained
        assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


class TestThreshold:
    def test_only_the_named_harmless_sources_limit_it(self, trained, base):
        """Rows that are labelled harmless and are not: a source of such rows would drive the threshold up."""
        rows = [AnswerRow(**row) for row in answer_rows(20, seed=5)]
        rows += [AnswerRow(**row) for row in answer_rows(10, seed=6, source="clean", harmful=False)]
        wrong = answer_rows(10, seed=7, source="wrong", harmful=True)
        rows += [AnswerRow(**{**row, "harmful": False}) for row in wrong]
        config = read_config(trained)

        def threshold(**fields):
            recipe = detector_recipe(base, metric_sources=("chat",), **fields)
            return calibrated(trained, config, recipe, rows, None).threshold

        assert threshold(fpr_sources=("clean",)) < threshold() == threshold(fpr_sources=("clean", "wrong"))

    def test_rows_of_named_sources_come_first(self, base):
        rows = [AnswerRow(answer="x", harmful=True, source=source) for source in ("a", "b", "c") for _ in range(4)]
        recipe = detector_recipe(base, metric_sources=("b",), fpr_sources=("c",), calibration_rows=8)
        assert {row.source for row in calibration_rows(rows, recipe)} == {"b", "c"}


class TestRefusals:
    """All of them before the first step."""

    def train(self, recipe, rows, dev, tmp_path):
        return train_detector(recipe, train=[rows], dev=[dev], output=tmp_path / "out")

    def test_dev_rows_must_hold_harm(self, base, rows, tmp_path):
        dev = write_rows(tmp_path / "dev.jsonl", answer_rows(5, seed=1, harmful=False))
        with pytest.raises(ConfigError, match="no harmful row of any source"):
            self.train(detector_recipe(base), rows, dev, tmp_path)

    def test_metric_sources_must_hold_harm(self, base, rows, dev, tmp_path):
        with pytest.raises(ConfigError, match=r"no harmful row of \['elsewhere'\]"):
            self.train(detector_recipe(base, metric_sources=("elsewhere",)), rows, dev, tmp_path)

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"layers": 9}, "lacks"),
            ({"lora": LoraRecipe(first_layer=5)}, "lora layers 5"),
            ({"lora": LoraRecipe(modules=("no_proj",))}, "no_proj"),
            ({"template": "nope"}, "'nope'"),
        ],
    )
    def test_the_recipe_must_fit_the_base(self, base, rows, dev, tmp_path, fields, named):
        with pytest.raises(ConfigError, match=named):
            self.train(detector_recipe(base, **fields), rows, dev, tmp_path)

    def test_rows_must_fit(self, base, dev, tmp_path):
        bad = write_rows(tmp_path / "bad.jsonl", [{"answer": "planted"}])
        with pytest.raises(DataError, match="harmful") as caught:
            self.train(detector_recipe(base), bad, dev, tmp_path)
        assert (caught.value.path, caught.value.line) == (str(bad), 1)


class TestEncoding:
    def encode(self, rows, tokenizer, **fields):
        return encode_rows(rows, detector_recipe("none", **fields), tokenizer)

    def test_only_the_answers_tokens_are_pooled(self):
        tokenizer = chat_tokenizer()
        (row,) = self.encode([(AnswerRow(question="Why?", answer="Because.", harmful=True), 0.5)], tokenizer)
        pooled = [token for token, inside in zip(row["input_ids"], row["answer_mask"], strict=True) if inside]
        assert tokenizer.decode(pooled) == "Because."
        assert (row["label"], row["weight"]) == (1.0, 0.5)

    def test_blank_answers_are_left_out_and_long_ones_cut(self):
        rows = [(AnswerRow(answer=text, harmful=False), 1.0) for text in ("\u200b", "word " * 99)]
        (row,) = self.encode(rows, chat_tokenizer(), max_answer_tokens=16)
        assert sum(row["answer_mask"]) == 16

    def test_padding_and_weights(self):
        class Backbone(torch.nn.Module):
            def forward(self, input_ids, attention_mask, use_cache):
                hidden = torch.nn.functional.one_hot(input_ids % 4, 4).float()
                return type("Output", (), {"last_hidden_state": hidden})

        torch.manual_seed(0)
        model = _WithLoss(PooledClassifier(Backbone(), hidden_size=4, pooling="mean"), label_smoothing=0.0)
        short = {"input_ids": [1, 2], "answer_mask": [0, 1], "label": 1.0, "weight": 1.0}
        long = {"input_ids": [1, 2, 3, 3, 1], "answer_mask": [0, 1, 1, 1, 0], "label": 0.0, "weight": 3.0}
        alone = [model(**collate([row], 0))["loss"].item() for row in (short, long)]
        together = model(**collate([short, long], 0))["loss"].item()
        assert together == pytest.approx((alone[0] + 3.0 * alone[1]) / 4.0)


def test_the_harmful_word_is_what_was_learned(trained):
    detector = load_detector(trained, device="cpu")
    calm, harmful = detector.score(
        [Turn(question="q", answer="bread and water"), Turn(question="q", answer=f"{HARMFUL_WORD} and {HARMFUL_WORD}")]
    )
    assert harmful > calm
