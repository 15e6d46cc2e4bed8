import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")


@pytest.fixture
def scorer() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(
        [sys.executable, "-m", "mllm_protector_guard.cli", "score", "--detector", "unit.cli_fakes:detector"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        yield process
        process.kill()


def test_a_row_of_a_pipe_does_not_wait_for_a_full_batch(scorer: "subprocess.Popen[bytes]") -> None:
    assert scorer.stdin is not None
    assert scorer.stdout is not None
    for answer in ("bomb", "bread", "bomb"):
        scorer.stdin.write(json.dumps({"answer": answer}).encode() + b"\n\n")
        scorer.stdin.flush()
        assert json.loads(scorer.stdout.readline())["harmful"] == (answer == "bomb")  # while the pipe is open
    scorer.stdin.close()
    assert scorer.wait(timeout=30) == 0


def test_a_reader_that_leaves_ends_the_command_quietly(scorer: "subprocess.Popen[bytes]") -> None:
    assert scorer.stdin is not None
    assert scorer.stdout is not None
    assert scorer.stderr is not None
    scorer.stdin.write(b'{"answer": "x"}\n')
    scorer.stdin.flush()
    scorer.stdout.readline()
    scorer.stdout.close()
    time.sleep(0.1)
    scorer.stdin.write(b'{"answer": "y"}\n' * 10)
    scorer.stdin.flush()
    messages = scorer.stderr.read()
    assert scorer.wait(timeout=30) == 1
    assert messages == b""


def test_the_command_imports_no_torch() -> None:
    code = "import sys; import mllm_protector_guard.cli.main; print('torch' in sys.modules, 'sklearn' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.split() == ["False", "False"]
