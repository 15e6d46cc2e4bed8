"""From rows to the loss of a step: pairs, weights, pooling, and how a step is put together."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_protector_guard import ConfigError
from mllm_protector_guard.models.pooling import PooledClassifier
from mllm_protector_guard.training import train_detector, train_detoxifier
from mllm_protector_guard.training.batches import collate, encode_rows
from mllm_protector_guard.training.config import SourceRecipe
from mllm_protector_guard.training.detector import _WithLoss
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow, licensed
from mllm_protector_guard.training.trainer import _ByLength
from models.tiny import chat_tokenizer
from training.tiny_processes import keep_gradients
from training.tiny_runs import answer_rows, detector_recipe, detoxifier_recipe, write_rows


def encoded(rows, **fields):
    return encode_rows(rows, detector_recipe("none", **fields), chat_tokenizer())


def row(answer, harmful, question="q", source="s", weight=1.0):
    return AnswerRow(question=question, answer=answer, harmful=harmful, source=source), weight


class Given(torch.nn.Module):
    """A backbone that returns the features it was given; its input ids choose among them."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(last_hidden_state=self.features[input_ids])


class TestPairs:
    def test_each_answer_has_at_most_one_partner_to_its_question(self):
        rows = [row("bad a", True), row("fine a", False), row("bad b", True), row("fine c", False, question="other")]
        items = encoded(rows, pair_weight=1.0)
        (pair,) = [item for item in items if "members" in item]
        assert [member["label"] for member in pair["members"]] == [1.0, 0.0]
        assert sorted(item["label"] for item in items if "members" not in item) == [0.0, 1.0]

    @pytest.mark.parametrize(
        "rows",
        [
            [row("bad", True), row("worse", True)],
            [row("bad", True, question=None), row("fine", False, question=None)],
            [row("bad", True, source="s"), row("fine", False, source="t")],
        ],
        ids=["two of a kind", "unknown questions", "two sources"],
    )
    def test_others_stay_alone(self, rows):
        assert not any("members" in item for item in encoded(rows, pair_weight=1.0))

    def test_without_a_weight_none_are_made(self):
        assert not any("members" in item for item in encoded([row("bad", True), row("fine", False)]))

    def test_a_batch_tells_which_rows_are_pairs(self):
        rows = [row("fine x", False, question="x"), row("bad", True), row("fine", False)]
        items = encoded(rows, pair_weight=1.0)
        batch = collate(sorted(items, key=lambda item: "members" in item), 0)
        assert batch["pairs"].tolist() == [[1, 2]]
        assert batch["labels"].tolist() == [0.0, 1.0, 0.0]
        assert batch["totals"].tolist() == [3.0, 1.0]


class TestLoss:
    def loss(self, logits, *, labels, weights, pairs=None, pair_weight=0.0, **more):
        model = _WithLoss(
            PooledClassifier(Given(torch.tensor(logits).unsqueeze(-1)), hidden_size=1, pooling="mean"),
            pair_weight=pair_weight,
        )
        torch.nn.init.ones_(model.classifier.head.weight)
        torch.nn.init.zeros_(model.classifier.head.bias)
        ids = torch.arange(len(logits)).unsqueeze(-1)
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            answer_mask=torch.ones_like(ids),
            labels=torch.tensor(labels),
            weights=torch.tensor(weights),
            totals=torch.tensor([sum(weights), float(len(pairs or ()))]),
            pairs=None if pairs is None else torch.tensor(pairs),
            **more,
        )["loss"].item()

    def test_weighted_mean_and_ranking_term(self):
        def cross_entropy(logit, label):
            probability = 1.0 / (1.0 + math.exp(-logit))
            return -math.log(probability if label else 1.0 - probability)

        mean = (2.0 * cross_entropy(0.5, 1) + 1.0 * cross_entropy(-1.0, 0) + 0.5 * cross_entropy(2.0, 0)) / 3.5
        ranking = math.log(1.0 + math.exp(-(0.5 - -1.0)))
        found = self.loss(
            [0.5, -1.0, 2.0], labels=[1.0, 0.0, 0.0], weights=[2.0, 1.0, 0.5], pairs=[[0, 1]], pair_weight=0.7
        )
        assert found == pytest.approx(mean + 0.7 * ranking, rel=1e-5)

    def test_four_times_it_is_the_official_loss_of_pairs(self):
        """2 * (BCE_safer + BCE_other) - log sigmoid(r_safer - r_other), r the logit of harmless, mean over pairs."""
        harmful, harmless = torch.tensor([0.5, -0.3]), torch.tensor([-1.0, 0.8])
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        safer, other = -harmless, -harmful
        official = 2 * (bce(safer, torch.ones(2)) + bce(other, torch.zeros(2)))
        official -= torch.nn.functional.logsigmoid(safer - other).mean()
        found = self.loss(
            [0.5, -1.0, -0.3, 0.8],
            labels=[1.0, 0.0, 1.0, 0.0],
            weights=[1.0] * 4,
            pairs=[[0, 1], [2, 3]],
            pair_weight=0.25,
        )
        assert 4 * found == pytest.approx(official.item(), rel=1e-5)

    def test_the_totals_of_the_step_take_the_place_of_the_batchs(self):
        fields = {"labels": [1.0, 0.0], "weights": [1.0, 1.0], "pairs": [[0, 1]], "pair_weight": 0.5}
        alone = self.loss([0.5, -1.0], **fields)
        assert self.loss([0.5, -1.0], num_items_in_batch=torch.tensor([8.0, 4.0]), **fields) == pytest.approx(alone / 4)


class TestSteps:
    @pytest.fixture
    def gradients(self, monkeypatch):
        return keep_gradients(monkeypatch.setattr)

    def compare(self, train, gradients):
        train(batch_size=8, gradient_accumulation=1)
        train(batch_size=1, gradient_accumulation=8)
        whole, summed = gradients
        assert any(gradient.abs().max() > 1e-3 for gradient in whole)
        for one, two in zip(whole, summed, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)

    def test_a_detectors_step_is_the_same_in_one_batch_and_in_eight(self, base, dev, tmp_path, gradients):
        """With rows of unequal length and weight, and with pairs in some batches alone."""
        rows = [{**r, "source": "heavy" if i < 3 else "chat"} for i, r in enumerate(answer_rows(6, seed=4))]
        rows = [{**r, "question": f"What is {i}?"} for i, r in enumerate(rows)]
        for name in "ab":
            rows += [{**r, "question": name, "source": "pair"} for r in answer_rows(2, seed=5)]
        file = write_rows(tmp_path / "rows.jsonl", rows)

        def train(**fields):
            recipe = detector_recipe(
                base, epochs=1, pair_weight=0.5, sources={"heavy": SourceRecipe(weight=5.0)}, **fields
            )
            train_detector(recipe, train=[file], dev=[dev], output=tmp_path / str(fields["batch_size"]))

        self.compare(train, gradients)

    def test_a_detoxifiers_step_is_the_same_in_one_batch_and_in_eight(self, base, tmp_path, gradients):
        """Its mean is over tokens, and these rewrites have 1 to 36 words."""
        rows = [
            {"question": "q", "rejected": f"bad {i}", "accepted": "bread " * (1 + 5 * i), "source": f"s{i % 2}"}
            for i in range(8)
        ]
        file = write_rows(tmp_path / "rows.jsonl", rows)

        def train(**fields):
            recipe = detoxifier_recipe(base, epochs=1, sources={"s1": SourceRecipe(weight=3.0)}, **fields)
            train_detoxifier(recipe, train=[file], output=tmp_path / str(fields["batch_size"]))

        self.compare(train, gradients)

    def test_no_row_left_is_refused(self, base, dev, tmp_path):
        blank = write_rows(tmp_path / "blank.jsonl", [{"answer": "\u200b", "harmful": True}])
        with pytest.raises(ConfigError, match="no row is left"):
            train_detector(detector_recipe(base), train=[blank], dev=[dev], output=tmp_path / "out")


class TestOrder:
    def test_it_depends_on_the_seed_and_on_nothing_else(self):
        lengths = [5, 9, 2, 7, 7, 1, 8, 3] * 4
        first = list(_ByLength(lengths, 4, lambda: 1))
        torch.rand(3)
        assert list(_ByLength(lengths, 4, lambda: 1)) == first
        assert sorted(first) == list(range(len(lengths)))
        assert list(_ByLength(lengths, 4, lambda: 2)) != first

    def test_every_epoch_asks_for_its_seed(self):
        seeds = iter([1, 2, 1])
        sampler = _ByLength([5, 9, 2, 7] * 4, 4, lambda: next(seeds))
        first, second, third = list(sampler), list(sampler), list(sampler)
        assert first != second
        assert first == third


class TestPeak:
    @given(
        features=st.lists(st.integers(-64, 64), min_size=1, max_size=24),
        before=st.integers(0, 3),
        after=st.integers(0, 3),
        size=st.integers(1, 30),
    )
    def test_it_is_the_highest_mean_over_all_stretches(self, features, before, after, size):
        logits = [value / 8 for value in features]  # sums of eighths are exact
        length = min(size, len(logits))
        expected = max(sum(logits[i : i + length]) / length for i in range(len(logits) - length + 1))
        assert self.pooled("peak", logits, before, after, size) == pytest.approx(expected, abs=1e-5)

    @given(features=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12), size=st.integers(12, 40))
    def test_for_a_short_answer_it_is_the_mean(self, features, size):
        peak, mean = (self.pooled(pooling, features, 2, 1, size) for pooling in ("peak", "mean"))
        assert peak == pytest.approx(mean, abs=1e-5)

    def test_rows_of_a_batch_do_not_touch_each_other(self):
        features = torch.tensor([[9.0], [1.0], [2.0], [-3.0]])
        model = self.model("peak", features, 2)
        ids = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 0]])
        mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])
        assert model(ids, torch.ones_like(ids), mask).tolist() == pytest.approx([1.5, -1.0])

    def pooled(self, pooling, logits, before, after, size):
        """What surrounds the answer is far worse than it, and must not count."""
        features = torch.tensor([100.0] * before + list(logits) + [100.0] * after).unsqueeze(-1)
        ids = torch.arange(len(features)).unsqueeze(0)
        mask = torch.tensor([[0] * before + [1] * len(logits) + [0] * after])
        return self.model(pooling, features, size)(ids, torch.ones_like(ids), mask).item()

    def model(self, pooling, features, size):
        model = PooledClassifier(Given(features), hidden_size=1, pooling=pooling, peak_tokens=size)
        torch.nn.init.ones_(model.head.weight)
        torch.nn.init.zeros_(model.head.bias)
        return model.eval().requires_grad_(False)


class TestEncodingWithDraws:
    def test_so_many_questions_are_dropped_as_asked(self):
        rows = [row("fine", False, question="Where is the cat?") for _ in range(200)]
        lengths = [len(item["input_ids"]) for item in encoded(rows, question_dropout=0.3)]
        assert len(set(lengths)) == 2
        assert 40 <= sum(length == min(lengths) for length in lengths) <= 80
        assert len({len(item["input_ids"]) for item in encoded(rows, question_dropout=1.0)}) == 1

    def test_a_buried_answer_keeps_all_its_tokens_and_all_are_pooled(self):
        rows = [row("knife knife", True), *(row("bread and water", False) for _ in range(5))]
        tokenizer = chat_tokenizer()
        item = encode_rows(rows, detector_recipe("none", bury_share=1.0, buried_tokens=64), tokenizer)[0]
        pooled = [token for token, inside in zip(item["input_ids"], item["answer_mask"], strict=True) if inside]
        assert "knife knife" in tokenizer.decode(pooled)
        assert "bread" in tokenizer.decode(pooled)
        assert 64 <= len(pooled) <= 70
        assert item["label"] == 1.0

    def test_only_harm_gets_a_disclaimer(self):
        rows = [row("knife", True), row("bread", False)]
        plain, changed = encoded(rows), encoded(rows, disclaimer_share=1.0)
        assert sum(changed[0]["answer_mask"]) > sum(plain[0]["answer_mask"])
        assert changed[1] == plain[1]


class TestLicences:
    def test_the_rows_that_match_from_the_beginning_are_kept(self):
        texts = ["MIT", "MIT (code), NC (data)", "CC-BY-4.0", "Apache-2.0", "not MIT"]
        rows = [RewriteRow(rejected=t, accepted="x", extra={"licence": t}) for t in texts]
        rows.append(RewriteRow(rejected="tells none", accepted="x"))
        kept = licensed(rows, r"(MIT|Apache-2\.0)(?!.*NC)")
        assert [r.rejected for r in kept] == ["MIT", "Apache-2.0"]
        assert licensed(rows, None) == rows

    @pytest.mark.parametrize(("pattern", "named"), [("GPL", "none of 1 rows"), ("(", "no regular expression")])
    def test_nothing_left_and_wrong_expressions_are_refused(self, pattern, named):
        rows = [AnswerRow(answer="planted", harmful=True, extra={"licence": "MIT"})]
        with pytest.raises(ConfigError, match=named) as caught:
            licensed(rows, pattern)
        assert "planted" not in str(caught.value)

    def test_both_trainings_ask_for_them(self, base, dev, rows, tmp_path):
        with pytest.raises(ConfigError, match="licence"):
            train_detector(detector_recipe(base, licences="MIT"), train=[rows], dev=[dev], output=tmp_path / "1")
        pairs = write_rows(tmp_path / "pairs.jsonl", [{"rejected": "bad", "accepted": "fine"}])
        with pytest.raises(ConfigError, match="licence"):
            train_detoxifier(detoxifier_recipe(base, licences="MIT"), train=[pairs], output=tmp_path / "2")
