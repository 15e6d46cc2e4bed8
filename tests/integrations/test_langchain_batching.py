"""Many chains at once share the passes of a detector that batches."""

import asyncio

from langchain_core.language_models import FakeListChatModel

from langchain_mllm_protector import ProtectorGuard
from mllm_protector_guard import BatchingDetector
from unit.batching_fakes import HeldDetector


async def test_64_chains_share_three_passes():
    with BatchingDetector(HeldDetector()) as detector:
        chain = FakeListChatModel(responses=["0.1 Roses."]) | ProtectorGuard(detector=detector, on_harm="withhold")
        asked = [asyncio.create_task(chain.ainvoke("What shall I plant?")) for _ in range(64)]
        while len(detector._waiting) < 63:
            await asyncio.sleep(0.001)
        detector.detector.free.set()
        assert {answer.content for answer in await asyncio.gather(*asked)} == {"0.1 Roses."}
        assert [len(batch) for batch in detector.detector.batches] == [1, 32, 31]
