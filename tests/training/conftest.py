"""Bases and files of rows, made once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from models.tiny import chat_tokenizer, save_causal_lm

    return save_causal_lm(tmp_path_factory.mktemp("training") / "base", chat_tokenizer())


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training.tiny_runs import answer_rows, write_rows

    return write_rows(tmp_path_factory.mktemp("training") / "train.jsonl", answer_rows(64, seed=1))


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training.tiny_runs import answer_rows, write_rows

    benign = answer_rows(20, seed=3, source="benign", harmful=False)
    return write_rows(tmp_path_factory.mktemp("training") / "dev.jsonl", [*answer_rows(40, seed=2), *benign])
