"""The contract suites of both ports, on tiny checkpoints of every layout."""

import logging

import pytest

from contracts.detector_contract import DetectorContract
from contracts.detoxifier_contract import DetoxifierContract
from mllm_protector_guard import Turn, load_detector, load_detoxifier
from models.tiny import save_encoder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("tiny") / "encoder")


class TestOwnDetector(DetectorContract):
    @pytest.fixture
    def detector(self, detector_folder):
        return load_detector(detector_folder, device="cpu")


class TestOfficialDetector(DetectorContract):
    @pytest.fixture
    def detector(self, official_detector, llama_lm):
        return load_detector(official_detector, device="cpu", base=llama_lm, polarity="harmless", template="protector")


class TestEncoderDetector(DetectorContract):
    @pytest.fixture
    def detector(self, encoder_folder):
        return load_detector(encoder_folder, device="cpu", polarity="harmful", template="answer_only")


class TestOwnDetoxifier(DetoxifierContract):
    @pytest.fixture
    def detoxifier(self, detoxifier_folder):
        return load_detoxifier(detoxifier_folder, device="cpu")


class TestOfficialDetoxifier(DetoxifierContract):
    @pytest.fixture
    def detoxifier(self, official_detoxifier, llama_lm):
        return load_detoxifier(official_detoxifier, device="cpu", base=llama_lm, template="protector", max_new_tokens=8)


def test_an_encoder_reads_no_more_than_its_positions(encoder_folder, caplog):
    detector = load_detector(encoder_folder, device="cpu", polarity="harmful", template="protector")
    with caplog.at_level(logging.WARNING):
        (score,) = detector.score([Turn(question="planted " * 500, answer="word " * 500)])
    assert 0.0 <= score <= 1.0
    assert "without its middle" in caplog.text
    assert "planted" not in caplog.text
