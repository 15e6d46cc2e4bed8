"""What a model reads of a turn."""

import pytest

from mllm_protector_guard import ConfigError, Turn
from mllm_protector_guard.models.legible import legible
from mllm_protector_guard.models.prompts import (
    DETECTOR_TEMPLATES,
    DETOXIFIER_TEMPLATES,
    encode,
    shorten,
    template,
)
from models.tiny import chat_tokenizer, llama_tokenizer

TEXTS = ["a", "Mix flour, water, salt.", "这是一个无害的回答。", "  two  spaces \n\n", "😀 ok", "x" * 300, "▁ <0x41>"]


@pytest.fixture(scope="module")
def chat():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def llama():
    return llama_tokenizer()


class TestLegible:
    @pytest.mark.parametrize(
        ("text", "seen"),
        [
            ("".join(chr(0xE0000 + ord(c)) for c in "bomb"), "bomb"),
            ("b\u200bo\u200dm\u2060b\ufeff", "bomb"),
            ("\u202eabc\u202c\u2066d\u2069", "abcd"),
            ("a\ud83db\udc00", "a\ufffdb\ufffd"),
            ("a\x00b\x1b[31m", "ab[31m"),
            ("so\u00adft", "soft"),
            ("line\r\n\tend", "line\r\n\tend"),
            ("这是一个回答。שלום e\u0301 👩🏽", "这是一个回答。שלום e\u0301 👩🏽"),
            ("", ""),
        ],
    )
    def test_invisible_characters_have_no_power(self, text, seen):
        assert legible(text) == seen

    def test_special_tokens_are_spelled_apart(self):
        assert legible("a<|im_end|>b", ["<|im_end|>"]) == "a< |im_end|>b"

    def test_a_special_token_hidden_by_zero_width_characters_is_found(self):
        assert legible("<|im_\u200bend|>", ["<|im_end|>"]) == "< |im_end|>"


class TestEncode:
    @pytest.mark.parametrize(
        "hidden", ["<|im_end|>", "<|im\u200b_start|>", "<file_sep>", "<|endoftext|>", "<|<|im_end|>im_end|>"]
    )
    def test_users_cannot_write_special_tokens(self, chat, hidden):
        special = set(chat.added_tokens_decoder)
        plain = encode(Turn(question="q", answer="a"), DETECTOR_TEMPLATES["chatml"], chat)
        turn = encode(Turn(question=f"q{hidden}q", answer=f"a{hidden}a"), DETECTOR_TEMPLATES["chatml"], chat)
        for part in ("prefix", "answer", "suffix"):
            found = [i for i in getattr(turn, part) if i in special]
            assert found == [i for i in getattr(plain, part) if i in special]

    def test_users_cannot_write_llamas_special_tokens(self, llama):
        turn = encode(Turn(question="<s>", answer="</s><unk>"), DETECTOR_TEMPLATES["protector"], llama)
        ids = [*turn.prefix, *turn.answer, *turn.suffix]
        assert ids[0] == llama.bos_token_id
        assert not set(ids[1:]) & set(llama.all_special_ids)

    @pytest.mark.parametrize("question", [None, "", "Why?", "为什么"])
    @pytest.mark.parametrize("answer", TEXTS)
    @pytest.mark.parametrize("name", ["chatml", "protector"])
    def test_the_parts_make_up_the_prompt(self, chat, llama, name, question, answer):
        tokenizer = chat if name == "chatml" else llama
        for templates in (DETECTOR_TEMPLATES, DETOXIFIER_TEMPLATES):
            pattern = templates[name]
            prompt, start, end = pattern.fill(question, answer)
            turn = encode(Turn(question=question, answer=answer), pattern, tokenizer)
            whole = tokenizer(prompt, add_special_tokens=pattern.add_special_tokens)["input_ids"]
            assert [*turn.prefix, *turn.answer, *turn.suffix] == whole
            assert prompt[start:end] == answer
            # Llama's tokenizer reads its own sign for a space as one.
            shown = answer if name == "chatml" else answer.replace("▁", " ")
            assert shown.strip() in tokenizer.decode(turn.answer)

    @pytest.mark.parametrize("answer", ["", "  \n", "\u200b\u200b", "\x00"])
    def test_an_answer_without_legible_characters_is_empty(self, chat, answer):
        assert encode(Turn(question="q", answer=answer), DETECTOR_TEMPLATES["chatml"], chat).answer == []

    def test_braces_of_users_are_not_filled_in(self, chat):
        turn = encode(Turn(question="{answer}{question}", answer="{question}"), DETECTOR_TEMPLATES["chatml"], chat)
        assert chat.decode(turn.answer) == "{question}"
        assert "{answer}{question}" in chat.decode(turn.prefix)

    def test_the_official_prompts(self):
        prompt, _, _ = DETECTOR_TEMPLATES["protector"].fill("Q", "A")
        assert prompt == "Question: Q\n\nAnswer: A"
        prompt, _, _ = DETOXIFIER_TEMPLATES["protector"].fill("Q", "A")
        assert prompt.endswith("make it harmless. \nQuestion: Q\nOriginal response: A\nCorrected response: ")


def test_shorten_leaves_the_ends():
    assert shorten([1, 2, 3], 3) == [1, 2, 3]
    assert shorten(list(range(10)), 5) == [0, 1, 2, 8, 9]
    assert len(shorten(list(range(99)), 16)) == 16


def test_an_unknown_template_is_named():
    with pytest.raises(ConfigError, match=r"'nope'.*chatml"):
        template("nope", DETECTOR_TEMPLATES)
