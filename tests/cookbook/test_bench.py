"""The timing benchmarks, with models too small to time."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig

from mllm_protector_guard import Turn
from models.tiny import chat_tokenizer, save_causal_lm, save_detector

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def _bench(monkeypatch):
    """The scripts import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if BENCH in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("bench")
    return save_detector(
        home / "detector", save_causal_lm(home / "base", chat_tokenizer()), window_tokens=64, overlap_tokens=16
    )


@pytest.fixture
def small_encoder(monkeypatch):
    import scoring

    shape = RobertaConfig(
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        **{"vocab_size": 400, "max_position_embeddings": scoring.WINDOW + 2, "type_vocab_size": 1},
    )
    monkeypatch.setattr(scoring, "ROBERTA_BASE", shape)
    return shape


def run(monkeypatch, capsys, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_rounds_begin_with_another_call_each_time():
    from rounds import alternated

    order = []
    ticks = iter(range(100))
    found = alternated({name: lambda n=name: order.append(n) for name in "abc"}, 2, clock=lambda: next(ticks))
    assert order == ["a", "b", "c", "b", "c", "a"]
    assert found == {"a": [1, 1], "b": [1, 1], "c": [1, 1]}


def test_a_spread_holds_median_and_quartiles():
    from rounds import Spread

    assert Spread.of([5, 1, 2, 4, 3]) == Spread(median=3, low=2, high=4)
    assert Spread.of([7]).shown(".1f") == "7.0 (7.0-7.0)"


class TestScoring:
    def test_both_are_timed_in_every_cell(self, folder, small_encoder, monkeypatch, capsys):
        import scoring

        options = ("--model", folder, "--tokens", 8, 80, "--batch", 1, 3, "--rounds", 2, "--device", "cpu")
        found = json.loads(run(monkeypatch, capsys, scoring.main, *options, "--json"))
        assert [(c["tokens"], c["batch"]) for c in found["cells"]] == [(8, 1), (8, 3), (80, 1), (80, 3)]
        times = [t for c in found["cells"] for of in c["seconds"].values() for who in of.values() for t in who]
        assert len(times) == 4 * 2 * 2 * 2
        assert min(times) > 0.0
        assert found["stages_ms"]["backbone"]["median"] < found["stages_ms"]["score, all of it"]["high"]

    def test_the_tables_can_be_read(self, folder, small_encoder, monkeypatch, capsys):
        import scoring

        options = ("--model", folder, "--tokens", 8, "--batch", 1, "--rounds", 2, "--dtype", "float32")
        out = run(monkeypatch, capsys, scoring.main, *options)
        assert "float32" in out
        assert "bfloat16" not in out
        assert "head and pooling" in out

    def test_answers_have_the_length_they_should_have_and_differ(self):
        import scoring

        tokenizer = chat_tokenizer()
        turns = scoring.answers(tokenizer, 50, 3)
        assert [len(tokenizer(turn.answer)["input_ids"]) for turn in turns] == [50] * 3
        assert len({turn.answer for turn in turns}) == 3

    def test_the_encoder_reads_all_of_an_answer_in_windows_and_gives_the_worst(self, small_encoder, monkeypatch):
        import scoring

        encoder = scoring.Encoder(small_encoder, chat_tokenizer(), torch.device("cpu"), "float32")
        read = []

        def forward(input_ids, attention_mask):
            read.append((tuple(input_ids.shape), int(attention_mask.sum())))
            return type("Output", (), {"logits": attention_mask.sum(dim=1, keepdim=True).float() / 1000.0})

        monkeypatch.setattr(encoder, "_model", type("Model", (), {"__call__": staticmethod(forward)})())
        encoder._model.config = small_encoder
        long, short = "z" * 1_100, "z" * 8
        scores = encoder.score([Turn(question=None, answer=long), Turn(question=None, answer=short)])
        tokens = len(chat_tokenizer()(long + short)["input_ids"])
        assert sum(count for _, count in read) == tokens
        assert scores[0] == pytest.approx(torch.sigmoid(torch.tensor(0.512)).item())
        assert scores[1] < scores[0]


class TestPlumbing:
    def test_every_way_is_timed(self, monkeypatch, capsys):
        import plumbing
        import plumbing_peers

        _few(monkeypatch, plumbing_peers)
        found = json.loads(run(monkeypatch, capsys, plumbing.main, "--rounds", 2, "--json"))
        figures = found["guards"]["mllm-protector-guard"]["figures"]
        assert list(figures) == ["invoke", "ainvoke", "stream", "astream", "batch", "abatch"]
        assert all(figure["bare_us"]["median"] > 0.0 for figure in figures.values())
        assert figures["stream"]["chunks"] > 1

    def test_a_guard_that_checks_nothing_is_not_measured(self):
        import plumbing_peers

        with pytest.raises(RuntimeError, match="checks nothing"):
            plumbing_peers.measure(lambda prompt, model: prompt | model, rounds=1, clock="wall")

    def test_a_way_that_fails_is_told(self, monkeypatch):
        import plumbing
        import plumbing_peers

        _few(monkeypatch, plumbing_peers)

        class NoStream(type(plumbing.ours(*_chain()))):
            def stream(self, *args, **kwargs):
                raise NotImplementedError

        def wrap(prompt, model):
            return NoStream(*plumbing.ours(prompt, model).steps)

        figures = plumbing_peers.measure(wrap, rounds=1, clock="cpu")
        assert figures["stream"] == {"error": "NotImplementedError"}
        assert "added_us" in figures["invoke"]
        table = plumbing.table({plumbing.OURS: {"figures": figures}, "other": {"figures": figures}}, "cpu")
        assert table.row_count == 6

    def test_a_peer_that_cannot_be_installed_is_left_out_with_a_note(self, tmp_path, monkeypatch, capsys):
        import plumbing

        monkeypatch.setattr(plumbing.sys, "executable", "/bin/false")
        options = ("--rounds", 1, "--json", "--peers", tmp_path)
        monkeypatch.setattr(plumbing, "measured_here", lambda rounds, clock: {"figures": {}})
        found = json.loads(run(monkeypatch, capsys, plumbing.main, *options))
        assert list(found["guards"]) == [plumbing.OURS]

    def test_a_peer_is_measured_by_its_own_interpreter(self, tmp_path, monkeypatch):
        import plumbing

        python = tmp_path / "guardrails-ai" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/sh\necho \'{"called": "\'"$4 $5 $6"\'"}\'\n')
        python.chmod(0o755)
        assert plumbing.measured_there("guardrails-ai", tmp_path, 3, "cpu") == {"called": "guardrails-ai 3 cpu"}


def _few(monkeypatch, plumbing_peers):
    monkeypatch.setattr(plumbing_peers, "BLOCK", 1)
    monkeypatch.setattr(plumbing_peers, "BATCH", 3)


def _chain():
    from langchain_core.prompts import ChatPromptTemplate
    from plumbing_peers import InstantModel

    return ChatPromptTemplate.from_messages([("human", "{question}")]), InstantModel(answer="A rose.")
