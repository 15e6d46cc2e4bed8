"""Models are loaded once, late, and without a trace in the process."""

import gc
import os
import threading
import warnings
import weakref

import pytest
import torch
import transformers

from mllm_protector_guard import GuardPolicy, Outcome, Turn, load_detector, load_detoxifier, load_guard
from mllm_protector_guard.fakes import KeywordDetector
from mllm_protector_guard.models import causal_lm
from mllm_protector_guard.models import detector_loading as detector_module

TURN = Turn(question="q", answer="a")


@pytest.fixture
def loads(monkeypatch):
    """The name of each model that is put into memory."""
    seen = []
    for module in (detector_module, causal_lm):
        plain = module.load_model

        def load_model(auto, *arguments, _plain=plain, **more):
            seen.append(auto.__name__)
            return _plain(auto, *arguments, **more)

        monkeypatch.setattr(module, "load_model", load_model)
    return seen


def test_equal_arguments_share_one_model(detector_folder, detoxifier_folder):
    assert load_detector(detector_folder, device="cpu") is load_detector(str(detector_folder), device="cpu")
    assert load_detoxifier(detoxifier_folder) is load_detoxifier(detoxifier_folder)
    first = load_detector(detector_folder, device="cpu")
    assert first is not load_detector(detector_folder, device="cpu", dtype="bfloat16")
    assert load_detoxifier(detoxifier_folder) is not load_detoxifier(detoxifier_folder, seed=1)


def test_a_relative_folder_is_the_one_seen_from_here(detector_folder, detoxifier_folder, monkeypatch, tmp_path):
    here = load_detector(detector_folder)
    monkeypatch.chdir(detector_folder.parent)
    assert load_detector(detector_folder.name) is here
    other = tmp_path / "other" / detector_folder.name
    other.parent.mkdir()
    os.symlink(detoxifier_folder, other)
    monkeypatch.chdir(other.parent)
    assert load_detoxifier(detector_folder.name) is load_detoxifier(detoxifier_folder)


def test_nothing_is_loaded_before_the_first_use(detector_folder, detoxifier_folder, loads):
    guard = load_guard(detector=detector_folder, detoxifier=detoxifier_folder, device="cpu")
    assert loads == []
    guard.check(TURN)
    assert loads[0] == "AutoModel"


def test_many_threads_load_once(detector_folder, loads):
    scores, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        scores.append(load_detector(detector_folder, device="cpu", revision="threads").score([TURN])[0])

    held = load_detector(detector_folder, device="cpu", revision="threads")
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["AutoModel"]
    assert scores == pytest.approx([held.score([TURN])[0]] * 8, abs=1e-6)


def test_unused_models_are_let_go(detector_folder, detoxifier_folder):
    detector = load_detector(detector_folder, device="cpu", revision="gone")
    detoxifier = load_detoxifier(detoxifier_folder, device="cpu", revision="gone")
    detector.score([TURN])
    detoxifier.rewrite([TURN])
    gone = [weakref.ref(each) for each in (detector, detoxifier, detoxifier._loaded.model)]
    del detector, detoxifier
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]


def test_loading_leaves_the_process_as_it_was(detector_folder, detoxifier_folder, official_detector, llama_lm):
    def state():
        log = transformers.utils.logging
        return (
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            log.get_verbosity(),
            log.is_progress_bar_enabled(),
            list(warnings.filters),
            dict(os.environ),
            threading.active_count(),
        )

    before = state()
    for model in (
        load_detector(detector_folder, device="cpu", revision="state"),
        load_detector(official_detector, device="cpu", base=llama_lm, polarity="harmless", template="protector"),
        load_detoxifier(detoxifier_folder, device="cpu", revision="state"),
    ):
        model.warm_up()
    assert state() == before


def test_a_load_that_failed_is_tried_again(detector_folder, monkeypatch):
    detector = load_detector(detector_folder, device="cpu", revision="again")
    with monkeypatch.context() as broken:
        broken.setattr(detector_module, "load_model", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            detector.score([TURN])
    assert len(detector.score([TURN])) == 1


class TestLoadGuard:
    def test_it_takes_folders_and_objects(self, detector_folder, detoxifier_folder):
        guard = load_guard(detector=KeywordDetector({"knife"}), detoxifier=detoxifier_folder, device="cpu")
        result = guard.check(Turn(question="q", answer="Take the knife."))
        assert result.outcome is Outcome.WITHHELD or "knife" not in result.text
        guard = load_guard(detector=detector_folder, detoxifier=detoxifier_folder, device="cpu")
        assert guard.threshold == load_detector(detector_folder).threshold

    def test_without_rewrites_no_detoxifier_is_loaded(self, detector_folder, loads):
        guard = load_guard(detector=detector_folder, policy=GuardPolicy(on_harm="withhold"), device="cpu")
        assert guard.detoxifier is None
        guard.check(TURN)
        assert loads in (["AutoModel"], [])
