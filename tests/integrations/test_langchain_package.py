"""What importing and installing the package does, and does not do."""

import doctest
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import langchain_mllm_protector
from langchain_mllm_protector import chat_model, guard, tracing

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "integrations")]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_is_exact() -> None:
    assert langchain_mllm_protector.__all__ == ["ProtectedChatModel", "ProtectorCallbackHandler", "ProtectorGuard"]
    assert all(hasattr(langchain_mllm_protector, name) for name in langchain_mllm_protector.__all__)


def test_importing_and_building_load_no_torch_open_no_socket_and_set_no_variable() -> None:
    assert (
        run(
            "import os, socket, sys\n"
            "before = dict(os.environ)\n"
            "def refuse(*args, **kwargs): raise AssertionError('a socket was opened')\n"
            "socket.socket.connect = socket.getaddrinfo = refuse\n"
            "import langchain_mllm_protector as package\n"
            "package.ProtectorGuard()\n"
            "assert dict(os.environ) == before\n"
            "print([name for name in ('torch', 'transformers') if name in sys.modules])"
        )
        == "[]"
    )


def test_only_the_first_guard_that_captures_registers_the_capture() -> None:
    assert (
        run(
            "from langchain_core.tracers import context\n"
            "count = lambda: len(context._configure_hooks)\n"
            "start = count(); seen = []\n"
            "import langchain_mllm_protector as package; seen.append(count() - start)\n"
            "package.ProtectorGuard(capture=False); seen.append(count() - start)\n"
            "package.ProtectorGuard(); package.ProtectorGuard(); seen.append(count() - start)\n"
            "print(seen)"
        )
        == "[0, 0, 1]"
    )


def test_a_guard_that_was_sent_to_another_process_captures_there() -> None:
    sent = pickle.dumps(langchain_mllm_protector.ProtectorGuard(threshold=0.25))
    assert (
        run(
            "import pickle\n"
            "from langchain_core.tracers import context\n"
            "start = len(context._configure_hooks)\n"
            f"guard = pickle.loads({sent!r})\n"
            "print(guard.threshold, len(context._configure_hooks) - start)"
        )
        == "0.25 1"
    )


def test_a_missing_framework_names_its_cure() -> None:
    out = run(
        "import sys\n"
        "sys.modules['langchain_core'] = None\n"
        "try:\n"
        "    import langchain_mllm_protector\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error.extra, error)\n"
    )
    assert out.startswith("MissingDependencyError langchain ")
    assert 'pip install "mllm-protector-guard[langchain]"' in out


@pytest.mark.parametrize("module", [chat_model, guard, tracing])
def test_the_examples_of_the_docstrings_run(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_help_explains_every_setting() -> None:
    text = langchain_mllm_protector.ProtectorGuard.__doc__ or ""
    for name, field in langchain_mllm_protector.ProtectorGuard.model_fields.items():
        assert f"\n        {field.alias or name}: " in text, name
