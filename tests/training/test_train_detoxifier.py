"""Training of detoxifiers on tiny models."""

import json
import re
from difflib import SequenceMatcher
from importlib import resources

import pytest
import torch
from transformers import LlamaForCausalLM

from mllm_protector_guard import ConfigError, DataError, Turn, load_detoxifier
from mllm_protector_guard.models.detoxifier import TransformersDetoxifier
from mllm_protector_guard.training import train_detoxifier
from mllm_protector_guard.training.adapters import add_lora
from mllm_protector_guard.training.detoxifier import _collate, _encode, _TargetLoss
from mllm_protector_guard.training.joining import turn_sha256
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow, read_training_rows
from mllm_protector_guard.training.targets import join_targets
from models.tiny import chat_tokenizer
from training.tiny_runs import answer_rows, detoxifier_recipe, write_rows

PAIRS = [
    {"question": "How do I get even?", "rejected": "Take the knife.", "accepted": "Bake bread."},
    {"question": "What is it?", "rejected": "You are worthless.", "accepted": "Bake bread."},
]


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", PAIRS)


class TestLearning:
    def test_it_reproduces_what_it_was_shown(self, base, pairs, tmp_path):
        folder = train_detoxifier(detoxifier_recipe(base), train=[pairs], output=tmp_path / "out")
        detoxifier = load_detoxifier(folder, device="cpu", max_new_tokens=16)
        turns = [Turn(question=row["question"], answer=row["rejected"]) for row in PAIRS]
        assert detoxifier.rewrite(turns) == [row["accepted"] for row in PAIRS]
        assert {path.name for path in folder.iterdir()} == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "guard.json",
        }
        with pytest.raises(ConfigError, match="already holds a checkpoint"):
            train_detoxifier(detoxifier_recipe(base), train=[pairs], output=folder)

    def test_harmless_answers_can_be_trained_to_come_back(self, base, pairs, tmp_path, caplog):
        harmless = write_rows(tmp_path / "harmless.jsonl", answer_rows(10, seed=1))
        recipe = detoxifier_recipe(base, identity_rows=3, epochs=1)
        with caplog.at_level("INFO"):
            train_detoxifier(recipe, train=[pairs], answers=[harmless], output=tmp_path / "out")
        assert "5 rows" in caplog.text

    def test_a_rewrite_does_not_repeat_more_of_the_answer_than_allowed(self, base, tmp_path):
        answer = "The knife is in the garden and the cat is in the picture"
        copied = write_rows(
            tmp_path / "copied.jsonl", [{"question": "Where?", "rejected": answer, "accepted": f"{answer[:30]}. No."}]
        )
        recipe = detoxifier_recipe(base, epochs=60, max_copied_tokens=6)
        folder = train_detoxifier(recipe, train=[copied], output=tmp_path / "out")
        tokenizer = chat_tokenizer()
        turn = Turn(question="Where?", answer=answer)

        def longest(text):
            one, two = (tokenizer(each)["input_ids"] for each in (text, answer))
            return SequenceMatcher(None, one, two, autojunk=False).find_longest_match().size

        limited = load_detoxifier(folder, device="cpu", max_new_tokens=48)
        free = TransformersDetoxifier(limited.config.model_copy(update={"max_copied_tokens": None}), limited._load)
        assert longest(free.rewrite([turn])[0]) > 6
        assert all(longest(limited.rewrite([turn], attempt=attempt)[0]) <= 6 for attempt in (0, 1))

    def test_nor_does_it_go_round_in_circles(self, base, tmp_path):
        again = "Bake the bread. Bake the bread. Bake the bread. Bake the bread."
        rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Where?", "rejected": "Knife.", "accepted": again}])
        recipe = detoxifier_recipe(base, epochs=60, max_copied_tokens=4)
        limited = load_detoxifier(train_detoxifier(recipe, train=[rows], output=tmp_path / "out"), max_new_tokens=48)
        free = TransformersDetoxifier(limited.config.model_copy(update={"max_copied_tokens": None}), limited._load)
        turn = Turn(question="Where?", answer="Knife.")
        assert free.rewrite([turn]) == [again]
        ids = chat_tokenizer()(limited.rewrite([turn])[0])["input_ids"]
        runs = [tuple(ids[start : start + 5]) for start in range(len(ids) - 4)]
        assert len(set(runs)) == len(runs)


class TestTargets:
    def test_targets_are_joined_with_the_answers_they_are_for(self, base, pairs, tmp_path):
        judged = answer_rows(6, seed=2)
        harmful = [row for row in judged if row["harmful"]]
        answers = write_rows(tmp_path / "answers.jsonl", judged)
        targets = write_rows(
            tmp_path / "rewrites.v1.jsonl",
            [
                {"sha256": turn_sha256(PAIRS[0]["question"], PAIRS[0]["rejected"]), "accepted": "one"},
                {"sha256": turn_sha256(harmful[0]["question"], harmful[0]["answer"]), "accepted": "two"},
            ],
        )
        joined = join_targets(
            [targets], read_training_rows([pairs], RewriteRow), read_training_rows([answers], AnswerRow)
        )
        assert [(row.rejected, row.accepted, row.file) for row in joined] == [
            (PAIRS[0]["rejected"], "one", "rewrites"),
            (harmful[0]["answer"], "two", "rewrites"),
        ]

    def test_a_target_for_no_answer_is_an_error(self, base, pairs, tmp_path):
        targets = write_rows(tmp_path / "targets.jsonl", [{"sha256": "0" * 64, "accepted": "planted"}])
        with pytest.raises(DataError, match="1 targets are for answers that are in none") as caught:
            train_detoxifier(detoxifier_recipe(base), train=[pairs], targets=[targets], output=tmp_path / "out")
        assert "planted" not in str(caught.value)

    def test_a_harmless_answer_is_no_owner_of_a_target(self, tmp_path):
        row = answer_rows(1, seed=1, harmful=False)[0]
        answers = read_training_rows([write_rows(tmp_path / "a.jsonl", [row])], AnswerRow)
        targets = write_rows(
            tmp_path / "t.jsonl", [{"sha256": turn_sha256(row["question"], row["answer"]), "accepted": "x"}]
        )
        with pytest.raises(DataError, match="none of the given files"):
            join_targets([targets], [], answers)

    def test_the_written_rewrites_are_whole(self):
        path = resources.files("mllm_protector_guard.training") / "written" / "rewrites.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(rows) > 2900
        assert len({row["sha256"] for row in rows}) == len(rows)
        firsts = {row["accepted"].partition(".")[0] for row in rows}
        assert len(firsts) > 0.99 * len(rows)
        assert all(len(row["accepted"].split()) <= 45 and len(row["accepted"]) <= 300 for row in rows)
        assert not [row for row in rows if re.search(r"[0-9]{3}-|\b(911|988|112)\b", row["accepted"])]
        assert all(row["extra"]["licence"].startswith("Apache-2.0") for row in rows)


class TestLoss:
    @pytest.fixture
    def recipe(self, base):
        return detoxifier_recipe(base)

    @pytest.fixture
    def encoded(self, recipe):
        rows = [(RewriteRow(**row), 1.0) for row in PAIRS]
        return _encode(rows, recipe, chat_tokenizer())

    def test_only_the_rewrite_has_labels(self, encoded):
        tokenizer = chat_tokenizer()
        for row, pair in zip(encoded, PAIRS, strict=True):
            target = [label for label in row["labels"] if label != -100]
            assert tokenizer.decode(target) == pair["accepted"] + "<|im_end|>"
            assert row["input_ids"][-len(target) :] == target
            prompt = tokenizer.decode(row["input_ids"][: -len(target)])
            assert pair["question"] in prompt
            assert pair["rejected"] in prompt

    def test_it_is_the_loss_of_transformers_on_the_masked_labels(self, base, recipe, encoded):
        model = LlamaForCausalLM.from_pretrained(base)
        batch = _collate(encoded, 0)
        with torch.no_grad():
            expected = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
            ).loss
            loss = _TargetLoss(add_lora(model, recipe, "base"))(**batch)["loss"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_the_weight_of_a_row_is_that_of_its_tokens(self, base, recipe, encoded):
        model = _TargetLoss(add_lora(LlamaForCausalLM.from_pretrained(base), recipe, "base"))
        only_first = [encoded[0], {**encoded[1], "weight": 1e-9}]
        with torch.no_grad():
            alone = model(**_collate(encoded[:1], 0))["loss"].item()
            assert model(**_collate(only_first, 0))["loss"].item() == pytest.approx(alone, rel=1e-4)

    def test_rows_that_are_too_long_or_blank_are_left_out(self, recipe):
        rows = [
            RewriteRow(rejected="bad", accepted="  "),
            RewriteRow(rejected="\u200b", accepted="fine"),
            RewriteRow(rejected="bad", accepted="word " * 999),
            RewriteRow(rejected="word " * 999, accepted="word", source="identity"),
            RewriteRow(rejected="bad", accepted="fine"),
        ]
        assert len(_encode([(row, 1.0) for row in rows], recipe, chat_tokenizer())) == 1


class TestRefusals:
    def test_identity_rows_need_files(self, base, pairs, tmp_path):
        with pytest.raises(ConfigError, match="identity_rows"):
            train_detoxifier(detoxifier_recipe(base, identity_rows=3), train=[pairs], output=tmp_path / "out")

    def test_rows_must_fit(self, base, tmp_path):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(json.dumps(PAIRS[0]) + "\n" + json.dumps({"question": "planted", "rejected": "planted"}) + "\n")
        with pytest.raises(DataError, match="accepted") as caught:
            train_detoxifier(detoxifier_recipe(base), train=[bad], output=tmp_path / "out")
        assert caught.value.line == 2
        assert "planted" not in str(caught.value)
