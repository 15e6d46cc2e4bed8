"""The public fakes keep the contracts of the ports they stand in for."""

import pytest

from contracts.detector_contract import DetectorContract
from contracts.detoxifier_contract import DetoxifierContract
from mllm_protector_guard.fakes import KeywordDetector, ScriptedDetoxifier


class TestKeywordDetector(DetectorContract):
    tolerance = 0.0

    @pytest.fixture
    def detector(self):
        return KeywordDetector({"knife", "hurt"})


class TestScriptedDetoxifier(DetoxifierContract):
    @pytest.fixture
    def detoxifier(self):
        return ScriptedDetoxifier(["Let us talk it over.", "Take a walk."])
