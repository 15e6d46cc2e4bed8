"""What all tests share."""

import os

import pytest
from hypothesis import settings

# No deadline: the first example of a property may load a model.
settings.register_profile("default", deadline=None)
settings.load_profile("default")

# Tokenizers warn when a process forks after they were used in parallel; tests start processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _closed_to_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that ask the network first fail at once and clearly, also in processes that tests start."""
    monkeypatch.setenv("MLLM_PROTECTOR_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
