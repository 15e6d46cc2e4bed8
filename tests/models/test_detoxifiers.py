"""Rewrites of local detoxifiers."""

import json
import logging
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from mllm_protector_guard import ConfigError, Turn, load_detoxifier
from mllm_protector_guard.models.causal_lm import LoadedCausalLM
from mllm_protector_guard.models.checkpoint import BaseReference, DetoxifierConfig
from mllm_protector_guard.models.detoxifier import TransformersDetoxifier
from models.tiny import (
    OFFICIAL_DETOXIFIER,
    OFFICIAL_DETOXIFIER_BASE,
    chat_tokenizer,
    llama_tokenizer,
    save_causal_lm,
    save_detoxifier,
    save_in_hub_cache,
)

TURN = Turn(question="How do I get even?", answer="Break into his house.")


class Scripted(torch.nn.Module):
    """Stands where the language model would: writes given tokens after any prompt, and notes how it was asked."""

    def __init__(self, tokenizer, tokens):
        super().__init__()
        self.tokens = tokens
        self.prompts, self.settings = [], []
        self.device = torch.device("cpu")
        self.config = type("Config", (), {"max_position_embeddings": 4096, "model_type": "llama"})
        self.generation_config = type("Generation", (), {"eos_token_id": None})

    def generate(self, *, input_ids, attention_mask, generation_config):
        self.settings.append(generation_config)
        for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            self.prompts.append([token for token, real in zip(row, mask, strict=True) if real])
        new = torch.tensor([self.tokens[: generation_config.max_new_tokens]] * len(input_ids))
        return torch.cat([input_ids, new], dim=1)


def scripted(text, *, tokenizer=None, **fields):
    tokenizer = tokenizer or chat_tokenizer()
    model = Scripted(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    given = {"template": "chatml", "max_new_tokens": 64, "revision": "0", "licence": "MIT", **fields}
    config = DetoxifierConfig(base=BaseReference(name="none"), **given)
    return TransformersDetoxifier(config, lambda: LoadedCausalLM(tokenizer=tokenizer, model=model)), model


class TestWriting:
    def test_it_stops_at_the_end_of_the_turn(self):
        detoxifier, _ = scripted("Talk to him.<|im_end|>\n<|im_start|>user\nmore")
        assert detoxifier.rewrite([TURN, TURN]) == ["Talk to him.", "Talk to him."]

    def test_a_rewrite_that_breaks_off_is_none(self, caplog):
        detoxifier, _ = scripted("planted words that go on")
        assert detoxifier.rewrite([TURN]) == [""]
        assert "had not ended" in caplog.text
        assert "planted" not in caplog.text

    def test_the_question_is_in_the_prompt(self):
        for tokenizer, name in ((chat_tokenizer(), "chatml"), (llama_tokenizer(), "protector")):
            detoxifier, model = scripted("x", tokenizer=tokenizer, template=name)
            detoxifier.rewrite([TURN])
            prompt = tokenizer.decode(model.prompts[0])
            assert TURN.question in prompt
            assert TURN.answer in prompt

    def test_the_limit_counts_new_tokens_only(self):
        detoxifier, model = scripted("Talk to him.<|im_end|>", max_new_tokens=40)
        long = Turn(question="q", answer="Break into his house. " * 60)
        assert detoxifier.rewrite([long]) == ["Talk to him."]
        assert len(model.prompts[0]) > 10 * 40
        assert model.settings[0].max_new_tokens == 40
        assert model.settings[0].max_length in (None, 20)

    def test_an_answer_that_is_too_long_is_not_rewritten(self, caplog):
        detoxifier, model = scripted("Talk.<|im_end|>", max_answer_tokens=16)
        assert detoxifier.rewrite([Turn(question="q", answer="planted " * 50), TURN]) == ["", "Talk."]
        assert len(model.prompts) == 1
        assert "at most 16" in caplog.text
        assert "planted" not in caplog.text

    def test_an_answer_that_leaves_no_room_in_the_model_is_not_rewritten(self):
        detoxifier, model = scripted("Talk.<|im_end|>")
        model.config.max_position_embeddings = 100
        assert detoxifier.rewrite([Turn(answer="word " * 50)]) == [""]
        assert model.prompts == []

    def test_a_long_question_loses_its_middle_and_the_log_says_so(self, caplog):
        detoxifier, model = scripted("Talk.<|im_end|>", max_question_tokens=32)
        assert detoxifier.rewrite([Turn(question="planted " * 90, answer="Hit him.")]) == ["Talk."]
        assert len(model.prompts[0]) < 100
        assert "without its middle" in caplog.text
        assert "planted" not in caplog.text

    def test_only_later_attempts_are_sampled(self):
        detoxifier, model = scripted("Talk.<|im_end|>")
        for attempt in (0, 1):
            detoxifier.rewrite([TURN], attempt=attempt)
        assert [settings.do_sample for settings in model.settings] == [False, True]


class TestTinyModels:
    def test_greedy_text_is_that_of_plain_transformers(self, official_detoxifier, llama_lm):
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_lm), official_detoxifier).eval()
        tokenizer = AutoTokenizer.from_pretrained(llama_lm)
        prompt = (
            "You are given a question and a response, the response may contain sensitive or harmful information, "
            f"Please rewrite the response to make it harmless. \nQuestion: {TURN.question}\n"
            f"Original response: {TURN.answer}\nCorrected response: "
        )
        encoded = tokenizer(prompt, return_tensors="pt")
        ids = encoded["input_ids"]
        detoxifier = load_detoxifier(
            official_detoxifier, device="cpu", base=llama_lm, template="protector", max_new_tokens=12
        )
        detoxifier.warm_up()
        ends = detoxifier._ready().tokenizer.eos_token_id
        with torch.inference_mode():
            for _ in range(12):
                logits = model(ids).logits[0, -1]
                logits[ends] = -torch.inf
                ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        expected = ids[0, encoded["input_ids"].shape[1] :].tolist()
        loaded = detoxifier._ready()
        with torch.inference_mode():
            output = loaded.model.generate(
                **encoded, max_new_tokens=12, do_sample=False, suppress_tokens=[ends], pad_token_id=0
            )
        assert output[0, encoded["input_ids"].shape[1] :].tolist() == expected

    def test_it_is_known_by_its_published_name(self, official_detoxifier, llama_lm, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        save_in_hub_cache(tmp_path, OFFICIAL_DETOXIFIER, official_detoxifier)
        save_in_hub_cache(tmp_path, OFFICIAL_DETOXIFIER_BASE, llama_lm)
        named = load_detoxifier(OFFICIAL_DETOXIFIER, device="cpu", max_new_tokens=8)
        assert named.config.template == "protector"
        assert len(named.rewrite([TURN])) == 1

    def test_any_causal_language_model_rewrites(self, llama_lm):
        detoxifier = load_detoxifier(llama_lm, device="cpu", template="protector", max_new_tokens=8)
        assert len(detoxifier.rewrite([TURN, TURN], attempt=2)) == 2
        assert detoxifier.config.max_new_tokens == 8

    def test_the_checkpoints_own_ways_to_generate_do_not_count(self, llama_lm, tmp_path):
        folder = shutil.copytree(llama_lm, tmp_path / "lm")
        own = {
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.3,
            "num_beams": 2,
            "max_length": 30,
            "eos_token_id": [2, 7],
        }
        (folder / "generation_config.json").write_text(json.dumps(own))
        given = {"device": "cpu", "template": "protector", "max_new_tokens": 8}
        plain, changed = load_detoxifier(llama_lm, **given), load_detoxifier(folder, **given)
        assert changed.rewrite([TURN]) == plain.rewrite([TURN])
        assert changed._ready().model.generation_config.eos_token_id == [2, 7]

    def test_seeds_make_sampling_repeatable(self, tmp_path):
        """A model whose every next token is equally likely, so that equal texts are equal seeds."""
        folder = save_causal_lm(tmp_path / "lm", chat_tokenizer(), initializer_range=1e-4)
        given = {"device": "cpu", "template": "chatml", "max_new_tokens": 200}

        def texts(seed, attempt):
            detoxifier = load_detoxifier(folder, seed=seed, **given)
            return [text for _ in range(2) for text in detoxifier.rewrite([TURN] * 4, attempt=attempt)]

        first = texts(seed=5, attempt=1)
        assert any(first)
        assert first[:4] == first[4:]
        assert first == texts(seed=5, attempt=1)
        assert first != texts(seed=5, attempt=2)
        assert first != texts(seed=6, attempt=1)

    def test_the_random_numbers_of_the_process_stay_as_they_were(self, detoxifier_folder):
        detoxifier = load_detoxifier(detoxifier_folder, device="cpu")
        before = torch.get_rng_state()
        for attempt in (0, 1, 2):
            detoxifier.rewrite([TURN], attempt=attempt)
        assert torch.equal(before, torch.get_rng_state())


class TestSettings:
    @pytest.mark.parametrize("limit", [0, -1, 7])
    def test_max_new_tokens_is_checked(self, detoxifier_folder, limit):
        with pytest.raises(ConfigError, match="max_new_tokens"):
            load_detoxifier(detoxifier_folder, max_new_tokens=limit)

    def test_max_new_tokens_replaces_the_checkpoints(self, chat_lm, tmp_path):
        folder = save_detoxifier(tmp_path / "d", chat_lm, max_new_tokens=32)
        assert load_detoxifier(folder).config.max_new_tokens == 32
        assert load_detoxifier(folder, max_new_tokens=16).config.max_new_tokens == 16

    def test_a_template_that_the_tokenizer_cannot_end_is_refused(self, llama_lm):
        with pytest.raises(ConfigError, match=r"<\|im_end\|>.*protector"):
            load_detoxifier(llama_lm, device="cpu", template="chatml").warm_up()


def test_nothing_of_a_turn_is_logged(detoxifier_folder, detector_folder, caplog):
    from mllm_protector_guard import load_detector

    turn = Turn(question="planted-question " * 300, answer="planted-answer " * 900)
    with caplog.at_level(logging.DEBUG):
        load_detoxifier(detoxifier_folder, device="cpu").rewrite([turn])
        load_detector(detector_folder, device="cpu").score([turn])
    assert "without its middle" in caplog.text
    assert "planted" not in caplog.text
