"""What only a CUDA device shows."""

import importlib.util

import pytest
import torch

from mllm_protector_guard import Turn, load_detector, load_detoxifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TURNS = [Turn(question="Why?", answer="Because it rained."), Turn(answer="word " * 900)]


def test_the_gpu_is_taken_by_itself_in_bfloat16(detector_folder):
    detector = load_detector(detector_folder)
    exact = load_detector(detector_folder, device="cpu").score(TURNS)
    assert detector.score(TURNS) == pytest.approx(exact, abs=0.1)
    assert detector._ready().device.type == "cuda"


def test_float32_on_the_gpu_is_the_cpus(detector_folder):
    exact = load_detector(detector_folder, device="cpu").score(TURNS)
    assert load_detector(detector_folder, device="cuda", dtype="float32").score(TURNS) == pytest.approx(exact, abs=1e-2)


def test_rewrites_leave_the_random_numbers_of_the_gpu(detoxifier_folder):
    detoxifier = load_detoxifier(detoxifier_folder, device="cuda")
    detoxifier.warm_up()
    before = torch.cuda.get_rng_state()
    assert detoxifier.rewrite(TURNS, attempt=1) == detoxifier.rewrite(TURNS, attempt=1)
    assert torch.equal(before, torch.cuda.get_rng_state())


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
def test_a_device_map_spreads_the_model(detector_folder):
    exact = load_detector(detector_folder, device="cpu").score(TURNS)
    assert load_detector(detector_folder, device_map="auto").score(TURNS) == pytest.approx(exact, abs=0.1)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_models_score_and_rewrite(detector_folder, detoxifier_folder, bits):
    scores = load_detector(detector_folder, device="cuda", quantization=bits).score(TURNS)
    assert all(0.0 <= score <= 1.0 for score in scores)
    assert len(load_detoxifier(detoxifier_folder, device="cuda", quantization=bits).rewrite(TURNS)) == 2
