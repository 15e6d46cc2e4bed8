"""Plans of a few drafts, and rows made by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm_protector_guard.training.endpoint import Meter
from mllm_protector_guard.training.generate import GenerationPlan, GenerationReport, generate
from mllm_protector_guard.training.scenarios import Scenario

SCENARIOS = [Scenario(name="Gardening", description="Weeds."), Scenario(name="Baking", description="Burnt bread.")]


def make(
    plan: GenerationPlan, chat: Any, meter: Meter | None = None, **options: Any
) -> tuple[list[dict[str, Any]], GenerationReport]:
    rows: list[dict[str, Any]] = []
    meter = meter or Meter()
    report = generate(plan, chat, meter, write=lambda row: rows.append(dict(row)), **options)
    return rows, report


def plan(**fields: Any) -> GenerationPlan:
    return GenerationPlan(**{"scenarios": SCENARIOS, "count": 3, **fields})


def key(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["extra"]["scenario"], row["extra"]["item"]
