"""Tiny checkpoints, made once; no test writes into them."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def chat_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model with ChatML tokens."""
    from models.tiny import chat_tokenizer, save_causal_lm

    return save_causal_lm(tmp_path_factory.mktemp("tiny") / "chat_lm", chat_tokenizer())


@pytest.fixture(scope="session")
def llama_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model with a tokenizer as Llama's."""
    from models.tiny import llama_tokenizer, save_causal_lm

    return save_causal_lm(tmp_path_factory.mktemp("tiny") / "llama_lm", llama_tokenizer())


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory: pytest.TempPathFactory, chat_lm: Path) -> Path:
    from models.tiny import save_detector

    return save_detector(tmp_path_factory.mktemp("tiny") / "detector", chat_lm)


@pytest.fixture(scope="session")
def detoxifier_folder(tmp_path_factory: pytest.TempPathFactory, chat_lm: Path) -> Path:
    from models.tiny import save_detoxifier

    return save_detoxifier(tmp_path_factory.mktemp("tiny") / "detoxifier", chat_lm)


@pytest.fixture(scope="session")
def official_detector(tmp_path_factory: pytest.TempPathFactory, llama_lm: Path) -> Path:
    from models.tiny import save_official_detector

    return save_official_detector(tmp_path_factory.mktemp("tiny") / "official_detector", llama_lm)


@pytest.fixture(scope="session")
def official_detoxifier(tmp_path_factory: pytest.TempPathFactory, llama_lm: Path) -> Path:
    from models.tiny import save_official_detoxifier

    return save_official_detoxifier(tmp_path_factory.mktemp("tiny") / "official_detoxifier", llama_lm)
