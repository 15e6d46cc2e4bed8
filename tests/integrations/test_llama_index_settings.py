"""The settings of the LlamaIndex classes, and the guard built from them."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode

import llama_index_mllm_protector
import mllm_protector_guard
from llama_index_mllm_protector import ProtectorPostprocessor, ProtectorQueryEngine
from llama_index_mllm_protector.settings import GuardSettings
from mllm_protector_guard import ConfigError, Guard, GuardPolicy
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier


class Roses(CustomQueryEngine):
    def custom_query(self, query_str: str) -> str:
        return "Water roses."


def make_guard() -> Guard:
    return Guard(detector=KeywordDetector({"bomb"}), detoxifier=ScriptedDetoxifier(["A garden."]))


BUILDERS: list[Callable[..., Any]] = [
    ProtectorPostprocessor,
    lambda **settings: ProtectorQueryEngine(Roses(), **settings),
]
both_classes = pytest.mark.parametrize("build", BUILDERS, ids=["postprocessor", "query_engine"])


class Loading:
    """Stands in for `load_guard` and notes its calls."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[dict[str, Any]] = []
        self.threads: list[int] = []
        self.seconds = seconds

    def __call__(self, **settings: Any) -> Guard:
        self.calls.append(settings)
        self.threads.append(threading.get_ident())
        time.sleep(self.seconds)
        return make_guard()


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Loading:
    loading = Loading()
    monkeypatch.setitem(vars(mllm_protector_guard), "load_guard", loading)
    return loading


@both_classes
def test_guard_is_built_from_the_settings_at_first_use(build: Callable[..., Any], loading: Loading) -> None:
    component = build(
        model="tiny", threshold=0.25, on_harm="flag", on_error="raise", max_attempts=3, timeout_s=9.0, refusal="No.",
        device="cpu", dtype="float32", local_files_only=True, trace_content=True,
    )  # fmt: skip
    assert loading.calls == []
    assert component.guard is component.guard
    assert loading.calls == [
        {
            "policy": GuardPolicy(
                threshold=0.25, on_harm="flag", on_error="raise", max_attempts=3, timeout_s=9.0, refusal="No."
            ),
            "model": "tiny",
            "device": "cpu",
            "dtype": "float32",
            "local_files_only": True,
            "trace_content": True,
        }
    ]


@both_classes
def test_defaults_are_those_of_load_guard(build: Callable[..., Any], loading: Loading) -> None:
    assert build().guard
    assert loading.calls == [{"policy": GuardPolicy()}]


@both_classes
def test_detector_detoxifier_and_sinks_reach_the_guard(build: Callable[..., Any], loading: Loading) -> None:
    detector, detoxifier = KeywordDetector({"x"}), ScriptedDetoxifier(["y"])
    assert build(detector=detector, detoxifier=detoxifier, sinks=()).guard
    assert loading.calls == [
        {"policy": GuardPolicy(), "detector": detector, "detoxifier": detoxifier, "sinks": ()}
    ]  # fmt: skip


@both_classes
def test_objects_need_no_weights(build: Callable[..., Any]) -> None:
    detector, detoxifier = KeywordDetector({"bomb"}), ScriptedDetoxifier(["A garden."])
    guard = build(detector=detector, detoxifier=detoxifier, threshold=0.3, trace_content=True).guard
    assert (guard.detector, guard.detoxifier, guard.threshold, guard.trace_content) == (detector, detoxifier, 0.3, True)


def test_many_threads_build_one_guard(loading: Loading) -> None:
    loading.seconds = 0.05
    postprocessor = ProtectorPostprocessor()
    start = threading.Barrier(8)

    def work(_: int) -> Guard:
        start.wait()
        return postprocessor.guard

    with ThreadPoolExecutor(8) as pool:
        guards = set(map(id, pool.map(work, range(8))))
    assert len(guards) == 1
    assert len(loading.calls) == 1


async def test_async_use_loads_off_the_event_loop(loading: Loading) -> None:
    await ProtectorPostprocessor().apostprocess_nodes([NodeWithScore(node=TextNode(text="Water roses."))])
    await ProtectorQueryEngine(Roses()).aquery("How?")
    assert len(loading.threads) == 2
    assert threading.get_ident() not in loading.threads


def test_a_failed_load_is_tried_again(monkeypatch: pytest.MonkeyPatch, loading: Loading) -> None:
    def fails(**_: object) -> Guard:
        raise RuntimeError("disk")

    monkeypatch.setitem(vars(mllm_protector_guard), "load_guard", fails)
    postprocessor = ProtectorPostprocessor()
    with pytest.raises(RuntimeError):
        _ = postprocessor.guard
    monkeypatch.setitem(vars(mllm_protector_guard), "load_guard", loading)
    assert postprocessor.guard


@both_classes
def test_ready_guard_excludes_the_rest(build: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"\['on_harm', 'threshold'\]"):
        build(guard=make_guard(), threshold=0.5, on_harm="flag")
    with pytest.raises(ConfigError, match="trace_content"):
        build(guard=make_guard(), trace_content=False)
    guard = make_guard()
    assert build(guard=guard, threshold=None).guard is guard


@both_classes
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"guard": KeywordDetector({"x"})}, "KeywordDetector"),
        ({"treshold": 0.5}, "treshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"on_harm": "scold"}, "on_harm"),
        ({"on_error": None}, "on_error"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"refusal": ""}, "refusal"),
    ],
)
def test_wrong_settings_fail_at_once(build: Callable[..., Any], settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(**settings)


@pytest.mark.parametrize("cls", [ProtectorPostprocessor, ProtectorQueryEngine])
def test_help_lists_every_setting(cls: type) -> None:
    lines = [line.partition(":")[0] for line in (cls.__doc__ or "").splitlines()]
    assert [line for line in lines if line in GuardSettings.__annotations__] == list(GuardSettings.__annotations__)
    assert "settings" in inspect.signature(cls).parameters


@pytest.mark.parametrize("module", ["postprocessor", "query_engine"])
def test_examples_run(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"llama_index_mllm_protector.{module}"))
    assert (failed, tried > 0) == (0, True)


def test_public_names() -> None:
    assert llama_index_mllm_protector.__all__ == [
        "ProtectorPostprocessor",
        "ProtectorQueryEngine",
        "ProtectorRewriteEvent",
        "ProtectorScoreEvent",
    ]


def in_a_new_process(code: str) -> str:
    paths = [p for p in sys.path if p]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_model_library() -> None:
    out = in_a_new_process(
        "import llama_index_mllm_protector\n"
        "print({'torch', 'transformers', 'langchain_core', 'mllm_protector_guard.models'} & set(sys.modules))"
    )
    assert out.strip() == "set()"


def test_missing_llama_index_names_the_cure() -> None:
    out = in_a_new_process(
        "sys.modules['llama_index'] = None\n"
        "try:\n"
        "    import llama_index_mllm_protector\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error.extra, error)\n"
    )
    assert out.startswith("MissingDependencyError llama-index ")
    assert 'pip install "mllm-protector-guard[llama-index]"' in out
