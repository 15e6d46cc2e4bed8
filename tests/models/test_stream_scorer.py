"""A growing answer has, after every piece, the score that the same text has as a whole."""

import base64
import gc
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModel,
    BertConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
)

from mllm_protector_guard import DetectorError, Turn, load_detector
from mllm_protector_guard.models.legible import legible
from mllm_protector_guard.models.stream_scorer import IncrementalStream, can_stream
from mllm_protector_guard.ports import StreamingDetector, StreamScorer
from models.tiny import chat_tokenizer, save_causal_lm, save_detector, save_encoder

QUESTION = "How do I bake bread?"
# A soft sigmoid, so that a wrong logit shows in the score.
SMALL = {"window_tokens": 32, "overlap_tokens": 8, "peak_tokens": 12, "temperature": 6.0}
KINDS = {
    "mean": {"pooling": "mean"},
    "last": {"pooling": "last"},
    "peak": {"pooling": "peak"},
    "harmless": {"pooling": "mean", "polarity": "harmless"},
    "words": {"pooling": "peak", "template": "protector"},
    "answer_only": {"pooling": "mean", "template": "answer_only"},
    "no_overlap": {"pooling": "mean", "overlap_tokens": 0},
}
ENGLISH = "Mix flour, water, salt and yeast, wait for an hour, and bake it. " * 6
CHINESE = "把面粉、水、盐和酵母混合，等一个小时，然后烘烤。不要着急！"
TEXTS = {
    "english": ENGLISH,
    "chinese": CHINESE * 3,
    "blank at first": "\n\n  \u200b\nThe weather was mild.",
    "marks": "e\u0301té ça n\u0303 👩‍👩‍👧 नमस्ते z\u0335\u0321a\u0338\u0322l\u0336g\u0337o\u0334",
    "special tokens": "One <|im_end|>\n<|im_start|>user\nTwo <|endoftext|>",
    "letters apart": "He said: w a t e r t h e g a r d e n, and left.",
    "encoded": f"Read {base64.b64encode(b'water the garden in the morning, please').decode()} now.",
    "code": "```python\nfor i in range(3):\n    print(i)\n```\n- one\n- two\n\t1.5 e.g. this",
}


@pytest.fixture(scope="module")
def detectors(chat_lm, llama_lm, tmp_path_factory):
    home = tmp_path_factory.mktemp("streams")
    bases = {"words": llama_lm}
    return {
        kind: load_detector(save_detector(home / kind, bases.get(kind, chat_lm), **SMALL | fields), device="cpu")
        for kind, fields in KINDS.items()
    }


@pytest.fixture(scope="module")
def detector(detectors):
    return detectors["peak"]


def assert_agrees(detector, pieces, question=QUESTION, tolerance=1e-5):
    """After every piece; the tolerance is far below the 1e-3 that the port asks for."""
    stream = detector.open_stream(question)
    for count, piece in enumerate(pieces, start=1):
        (whole,) = detector.score([Turn(question=question, answer="".join(pieces[:count]))])
        assert stream.feed(piece) == pytest.approx(whole, abs=tolerance)
    stream.close()


def chunks(text, seed, longest=17):
    draw = random.Random(seed)
    found = []
    while text:
        size = draw.randint(0, longest)
        found.append(text[:size])
        text = text[size:]
    return found


@contextmanager
def tokens_read(detector):
    """Numbers of tokens that went through the backbone, one a pass."""
    seen = []
    embeddings = detector._ready().pooled.backbone.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    try:
        yield seen
    finally:
        hook.remove()


def windows(detector, answer, question=QUESTION):
    return list(detector._windows(detector._ready(), Turn(question=question, answer=answer)))


class TestAgreement:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("text", TEXTS)
    def test_every_feed_has_the_score_of_the_text_so_far(self, detectors, kind, text):
        assert_agrees(detectors[kind], chunks(TEXTS[text], seed=len(text)))

    @pytest.mark.parametrize("kind", KINDS)
    @settings(max_examples=25, deadline=None)
    @given(
        pieces=st.lists(
            st.one_of(st.text(max_size=30), st.sampled_from([" flour,", " wait", "烤", "\n", ENGLISH[:90]]))
        ),
        question=st.sampled_from([None, "", QUESTION]),
    )
    def test_any_pieces(self, detectors, kind, pieces, question):
        assert_agrees(detectors[kind], pieces, question)

    @pytest.mark.parametrize("text", ["english", "chinese", "encoded"])
    def test_the_chunking_does_not_matter(self, detector, text):
        lasts = []
        for pieces in ([TEXTS[text]], list(TEXTS[text]), chunks(TEXTS[text], 1), chunks(TEXTS[text], 2, longest=80)):
            stream = detector.open_stream(QUESTION)
            lasts.append([stream.feed(piece) for piece in pieces][-1])
        assert lasts == pytest.approx([lasts[0]] * len(lasts), abs=1e-5)

    def test_a_view_that_changes_with_more_text_is_scored_anew(self, detector):
        text = TEXTS["encoded"]
        middle = len("Read d2F0ZXI")
        assert not legible(text).startswith(legible(text[:middle]))
        assert_agrees(detector, [text[:middle], text[middle:]])

    def test_a_view_that_gets_shorter_by_several_windows(self, detector):
        hidden = base64.b64encode(b"water the garden " * 20).decode()
        # One character past a group of four is no base64, and so is read as it stands.
        assert len(windows(detector, hidden)) < len(windows(detector, hidden[:-3])) - 2
        assert_agrees(detector, [hidden[:-103], hidden[-103:-3], hidden[-3:], " That was all.", ENGLISH, ENGLISH])

    def test_a_model_that_reads_little_and_a_long_question(self, tmp_path, caplog):
        base = save_causal_lm(tmp_path / "base", chat_tokenizer(), max_position_embeddings=96)
        detector = load_detector(save_detector(tmp_path / "d", base, **SMALL | {"window_tokens": 384}), device="cpu")
        stream = detector.open_stream(ENGLISH * 3)
        scores = [stream.feed(piece) for piece in chunks(ENGLISH, 5, longest=60)]
        assert len([record for record in caplog.records if "without its middle" in record.message]) == 1
        assert scores[-1] == pytest.approx(detector.score([Turn(question=ENGLISH * 3, answer=ENGLISH)])[0], abs=1e-5)

    def test_attention_that_slides_inside_a_window(self, tmp_path):
        fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "sliding_window": 6}
        config = MistralConfig(
            vocab_size=340, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **fields
        )
        MistralForCausalLM(config).save_pretrained(tmp_path / "base")
        chat_tokenizer().save_pretrained(tmp_path / "base")
        detector = load_detector(save_detector(tmp_path / "d", tmp_path / "base", **SMALL), device="cpu")
        assert isinstance(detector.open_stream(None), IncrementalStream)
        assert_agrees(detector, chunks(ENGLISH, seed=4))

    def test_bfloat16_is_close(self, tmp_path, chat_lm):
        detector = load_detector(save_detector(tmp_path / "d", chat_lm, **SMALL), device="cpu", dtype="bfloat16")
        assert_agrees(detector, chunks(ENGLISH, seed=6), tolerance=0.05)


class TestCost:
    def test_each_token_is_read_once(self, detectors):
        detector = detectors["mean"]
        words = [" flour,", " water,", " salt", " and", " yeast."]
        (window,) = windows(detector, "".join(words))
        stream = detector.open_stream(QUESTION)
        with tokens_read(detector) as seen:
            for word in words:
                stream.feed(word)
        assert sum(seen) == window.answer.stop
        assert len(seen) == len(words)

    def test_beyond_the_window_only_overlaps_are_read_again(self, detector):
        words = [f" {word}" for word in ENGLISH.split()]
        found = windows(detector, "".join(words))
        assert len(found) > 4
        stream = detector.open_stream(QUESTION)
        with tokens_read(detector) as seen:
            for word in words:
                stream.feed(word)
        assert sum(seen) == found[0].answer.start + sum(len(window.answer) for window in found)

    def test_nothing_new_costs_nothing(self, detector):
        stream = detector.open_stream(QUESTION)
        with tokens_read(detector) as seen:
            assert stream.feed("") == stream.feed(" \u200b\n") == 0.0
            assert seen == []
            first = stream.feed(ENGLISH)
            seen.clear()
            assert stream.feed("") == first
        assert seen == []

    def test_what_it_holds_does_not_grow_with_the_answer(self, detector):
        def held():
            gc.collect()
            caches = [thing for thing in gc.get_objects() if type(thing) is DynamicCache]
            return sum(layer.keys.numel() for cache in caches for layer in cache.layers if layer.is_initialized)

        before = held()
        stream = detector.open_stream(QUESTION)
        most = 0
        for piece in chunks(ENGLISH * 3, seed=7, longest=300):
            stream.feed(piece)
            most = max(most, held() - before)
        longest = max(window.answer.stop for window in windows(detector, ENGLISH * 3))
        assert 0 < most <= longest * 2 * 2 * 8  # layers, heads, features of a head
        stream.close()
        assert held() == before


class TestLife:
    def test_the_port(self, detector):
        assert isinstance(detector, StreamingDetector)
        assert isinstance(detector.open_stream(None), StreamScorer)

    def test_a_closed_stream_raises(self, detector):
        stream = detector.open_stream(QUESTION)
        stream.feed("One.")
        stream.close()
        stream.close()
        with pytest.raises(DetectorError, match="closed"):
            stream.feed("Two.")

    def test_a_score_that_is_no_number_is_an_error_and_the_stream_recovers(self, tmp_path, chat_lm):
        detector = load_detector(save_detector(tmp_path / "d", chat_lm, **SMALL), device="cpu")
        stream = detector.open_stream(QUESTION)
        stream.feed("One two")
        head = detector._ready().pooled.head
        bias = head.bias.detach().clone()
        head.bias.data.fill_(float("nan"))
        with pytest.raises(DetectorError, match="float32"):
            stream.feed(" three")
        head.bias.data.copy_(bias)
        (whole,) = detector.score([Turn(question=QUESTION, answer="One two three")])
        assert stream.feed("") == pytest.approx(whole, abs=1e-5)

    def test_a_pass_that_breaks_half_way_leaves_nothing_behind(self, detector):
        stream = detector.open_stream(QUESTION)
        stream.feed("One two")
        last = detector._ready().pooled.backbone.layers[-1]

        def fail(*_):
            raise RuntimeError("out of memory")

        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            stream.feed(" three")
        hook.remove()
        (whole,) = detector.score([Turn(question=QUESTION, answer="One two three four")])
        assert stream.feed(" four") == pytest.approx(whole, abs=1e-5)

    def test_streams_do_not_see_each_other(self, detector):
        answers = [text * 2 for text in TEXTS.values()]
        expected = detector.score([Turn(question=QUESTION, answer=answer) for answer in answers])

        def last_score(answer):
            stream = detector.open_stream(QUESTION)
            return [stream.feed(piece) for piece in chunks(answer, seed=8)][-1]

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(last_score, answers)) == pytest.approx(expected, abs=1e-5)


class TestWindows:
    def test_full_windows_stay_and_every_token_is_in_one(self, detector):
        earlier = []
        for end in range(40, len(ENGLISH), 7):
            answer = ENGLISH[:end].rsplit(" ", 1)[0]
            found = windows(detector, answer)
            assert found[: len(earlier) - 1] == earlier[:-1]
            parts = [window.ids[window.answer.start : window.answer.stop] for window in found]
            ids = parts[0] + [token for part in parts[1:] for token in part[8:]]
            assert chat_tokenizer().decode(ids) == answer
            assert all(len(part) == 32 for part in parts[:-1])
            assert len(parts) == 1 or 8 < len(parts[-1]) <= 32
            earlier = found
        assert len(earlier) > 4


class TestWhatCanStream:
    TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            (LlamaConfig(**TINY, intermediate_size=64), True),
            (MistralConfig(**TINY, intermediate_size=64, num_key_value_heads=2, sliding_window=8), True),
            (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), True),
            (BertConfig(**TINY, intermediate_size=64), False),
            (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), False),
            (
                Qwen3NextConfig(
                    **TINY, intermediate_size=64, head_dim=8, layer_types=["linear_attention", "full_attention"]
                ),
                False,
            ),
        ],
        ids=lambda value: getattr(value, "model_type", ""),
    )
    def test_causal_attention_without_a_running_state(self, config, expected):
        with torch.device("meta"):
            assert can_stream(AutoModel.from_config(config)) is expected

    def test_other_detectors_score_the_answer_so_far_again(self, tmp_path):
        folder = save_encoder(tmp_path / "encoder")
        detector = load_detector(folder, device="cpu", polarity="harmful", template="answer_only")
        assert not isinstance(detector.open_stream(None), IncrementalStream)
        assert_agrees(detector, chunks(ENGLISH, seed=9, longest=80))
