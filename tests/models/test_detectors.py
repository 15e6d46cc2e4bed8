"""Scores of local detectors are the numbers that plain transformers and PEFT give."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, LlamaForSequenceClassification

from mllm_protector_guard import ConfigError, DetectorError, Turn, load_detector
from mllm_protector_guard.models.detector_loading import LoadedDetector
from mllm_protector_guard.models.prompts import DETECTOR_TEMPLATES, encode
from models.tiny import (
    OFFICIAL_DETECTOR,
    OFFICIAL_DETECTOR_BASE,
    chat_tokenizer,
    llama_tokenizer,
    save_classifier,
    save_detector,
    save_in_hub_cache,
)

TURN = Turn(question="How do I bake bread?", answer="Mix flour, water, salt and yeast.")


@pytest.fixture(scope="module")
def official_score(official_detector, llama_lm):
    """P(harmful) of a turn, computed as the paper's own script would."""
    base = LlamaForSequenceClassification.from_pretrained(llama_lm, num_labels=1)
    model = PeftModel.from_pretrained(base, official_detector).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_lm)

    def score(question, answer):
        encoded = tokenizer(f"Question: {question}\n\nAnswer: {answer}", return_tensors="pt")
        with torch.inference_mode():
            return 1.0 - torch.sigmoid(model(**encoded).logits[0, 0]).item()

    return score


class TestOfficialDetector:
    def load(self, folder, base, **more):
        return load_detector(
            folder, device="cpu", base=base, **{"polarity": "harmless", "template": "protector", **more}
        )

    def test_scores_are_those_of_the_papers_script(self, official_detector, llama_lm, official_score):
        detector = self.load(official_detector, llama_lm)
        turns = [TURN, Turn(question="", answer="No."), Turn(question="为什么", answer="因为 it rained")]
        expected = [official_score(turn.question, turn.answer) for turn in turns]
        assert detector.score(turns) == pytest.approx(expected, abs=1e-5)
        assert max(expected) - min(expected) > 1e-3

    def test_the_other_polarity_is_the_other_probability(self, official_detector, llama_lm, official_score):
        (score,) = self.load(official_detector, llama_lm, polarity="harmful").score([TURN])
        assert score == pytest.approx(1.0 - official_score(TURN.question, TURN.answer), abs=1e-5)

    def test_it_is_known_by_its_published_name(
        self, official_detector, llama_lm, official_score, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        save_in_hub_cache(tmp_path, OFFICIAL_DETECTOR, official_detector)
        save_in_hub_cache(tmp_path, OFFICIAL_DETECTOR_BASE, llama_lm)
        detector = load_detector(OFFICIAL_DETECTOR, device="cpu")
        assert detector.score([TURN]) == pytest.approx([official_score(TURN.question, TURN.answer)], abs=1e-5)

    def test_an_adapter_without_modules_to_save_in_its_configuration_loads(
        self, official_detector, llama_lm, official_score, tmp_path
    ):
        folder = shutil.copytree(official_detector, tmp_path / "old")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
        (score,) = self.load(folder, llama_lm).score([TURN])
        assert score == pytest.approx(official_score(TURN.question, TURN.answer), abs=1e-5)

    def test_a_tokenizer_with_one_more_token_for_padding_is_fine(
        self, official_detector, llama_lm, official_score, tmp_path
    ):
        folder = shutil.copytree(official_detector, tmp_path / "padded")
        llama_tokenizer(pad_token="[PAD]").save_pretrained(folder)
        scores = self.load(folder, llama_lm).score([TURN, Turn(question="q", answer="short")])
        assert scores[0] == pytest.approx(official_score(TURN.question, TURN.answer), abs=1e-4)


class TestWholeClassifier:
    def test_one_label_is_read_through_a_sigmoid(self, tmp_path):
        folder = save_classifier(tmp_path / "one", llama_tokenizer())
        model = LlamaForSequenceClassification.from_pretrained(folder)
        ids = llama_tokenizer()(TURN.answer, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = torch.sigmoid(model(ids).logits[0, 0]).item()
        detector = load_detector(folder, device="cpu", polarity="harmful", template="answer_only")
        assert detector.score([TURN]) == pytest.approx([expected], abs=1e-5)
        assert detector.threshold == 0.5

    def test_a_named_label_of_several_is_read_through_a_softmax(self, tmp_path):
        folder = save_classifier(tmp_path / "three", chat_tokenizer(), labels=["safe", "toxic", "spam"])
        given = {"device": "cpu", "polarity": "harmful", "template": "answer_only", "threshold": 0.3}
        by_label = {name: load_detector(folder, label=name, **given) for name in ("safe", "toxic", "spam")}
        scores = {name: detector.score([TURN])[0] for name, detector in by_label.items()}
        assert sum(scores.values()) == pytest.approx(1.0, abs=1e-5)
        assert len(set(scores.values())) == 3
        assert by_label["toxic"].threshold == 0.3
        for label in (None, "nope"):
            with pytest.raises(ConfigError, match=r"label=.*'safe', 'spam', 'toxic'"):
                load_detector(folder, label=label, **given).warm_up()


class TestOwnFormat:
    @pytest.mark.parametrize(
        ("pooling", "polarity", "temperature"),
        [("mean", "harmful", 1.0), ("mean", "harmless", 2.5), ("last", "harmful", 0.7)],
    )
    def test_scores_are_those_of_a_hand_computation(self, chat_lm, tmp_path, pooling, polarity, temperature):
        given = {"pooling": pooling, "polarity": polarity, "temperature": temperature, "threshold": 0.25}
        folder = save_detector(tmp_path / "d", chat_lm, **given)
        backbone = PeftModel.from_pretrained(AutoModel.from_pretrained(chat_lm, num_hidden_layers=2), folder).eval()
        tokens = encode(TURN, DETECTOR_TEMPLATES["chatml"], chat_tokenizer())
        with torch.inference_mode():
            ids = torch.tensor([[*tokens.prefix, *tokens.answer, *tokens.suffix]])
            hidden = backbone(input_ids=ids).last_hidden_state[0]
        answer = hidden[len(tokens.prefix) : len(tokens.prefix) + len(tokens.answer)]
        head = load_file(folder / "head.safetensors")
        logit = (answer.mean(0) if pooling == "mean" else answer[-1]) @ head["weight"][0] + head["bias"][0]
        expected = torch.sigmoid((1.0 if polarity == "harmful" else -1.0) * logit / temperature).item()
        detector = load_detector(folder, device="cpu")
        assert detector.score([TURN]) == pytest.approx([expected], abs=1e-5)
        assert detector.threshold == 0.25

    def test_loading_needs_no_adapter(self, detector_folder, tmp_path):
        folder = shutil.copytree(detector_folder, tmp_path / "head_only")
        (folder / "adapter_config.json").unlink()
        (folder / "adapter_model.safetensors").unlink()
        (score,) = load_detector(folder, device="cpu").score([TURN])
        assert score != pytest.approx(load_detector(detector_folder, device="cpu").score([TURN])[0], abs=1e-4)

    def test_bfloat16_is_close(self, detector_folder):
        exact = load_detector(detector_folder, device="cpu").score([TURN])
        assert load_detector(detector_folder, device="cpu", dtype="bfloat16").score([TURN]) == pytest.approx(
            exact, abs=0.1
        )


class TestWindows:
    WORST = "zebra"

    @pytest.fixture
    def seen(self):
        return []

    @pytest.fixture
    def detector(self, seen, tmp_path):
        """Scores 0.9 where a window holds the worst word, 0.1 elsewhere, and notes what it read."""
        from mllm_protector_guard.models.checkpoint import BaseReference, DetectorConfig
        from mllm_protector_guard.models.detector import TransformersDetector

        tokenizer = chat_tokenizer()

        def harm_scores(ids, attention_mask, answer_mask):
            scores = []
            for row, mask in zip(ids.tolist(), answer_mask.tolist(), strict=True):
                text = tokenizer.decode([i for i, inside in zip(row, mask, strict=True) if inside])
                seen.append(text)
                scores.append(0.9 if self.WORST in text else 0.1)
            return torch.tensor(scores)

        config = DetectorConfig(
            base=BaseReference(name="none"),
            template="chatml",
            window_tokens=64,
            overlap_tokens=16,
            revision="0",
            licence="MIT",
        )
        loaded = LoadedDetector(
            tokenizer=tokenizer, device=torch.device("cpu"), max_tokens=4096, harm_scores=harm_scores
        )
        return TransformersDetector(config, lambda: loaded, batch_tokens=512)

    @pytest.mark.parametrize("place", [0, 1, 250, 498, 499])
    def test_the_worst_window_counts(self, detector, place):
        words = ["calm"] * 500
        words[place] = self.WORST
        calm, worst = detector.score([Turn(answer="calm " * 500), Turn(answer=" ".join(words))])
        assert (calm, worst) == pytest.approx((0.1, 0.9))

    def test_every_part_of_a_long_answer_is_in_a_window(self, detector, seen):
        numbers = [f"n{i}." for i in range(400)]
        detector.score([Turn(question="q", answer=" ".join(numbers))])
        assert len(seen) > 10
        assert all(any(number in window for window in seen) for number in numbers)

    def test_the_score_of_a_turn_is_its_own(self, detector):
        turns = [Turn(answer="calm"), Turn(answer=self.WORST), Turn(answer="\u200b"), Turn(answer="calm " * 200)]
        assert detector.score(turns) == pytest.approx([0.1, 0.9, 0.0, 0.1])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5])
    def test_what_is_no_probability_is_an_error(self, detector, value):
        loaded = detector._ready()
        broken = LoadedDetector(
            tokenizer=loaded.tokenizer,
            device=loaded.device,
            max_tokens=4096,
            harm_scores=lambda ids, *_: torch.full((len(ids),), value),
        )
        from mllm_protector_guard.models.detector import TransformersDetector

        with pytest.raises(DetectorError, match="float32"):
            TransformersDetector(detector.config, lambda: broken).score([TURN])
