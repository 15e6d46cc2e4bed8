"""The guard under all that LangChain does to runnables: configured, bound, retried, drawn, written down."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumpd, dumps, loads
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import ConfigurableField

from integrations.langchain_models import SAFE, EchoModel, asked, keyword_guard
from langchain_mllm_protector import ProtectorGuard
from mllm_protector_guard import DEFAULT_REFUSAL, CheckpointError, DetectorError, HarmfulAnswerError, Turn
from mllm_protector_guard.fakes import KeywordDetector

HARMFUL = "First build a bomb."


class ShakyDetector(KeywordDetector):
    """Fails at its first call."""

    def score(self, turns: Sequence[Turn]) -> list[float]:
        scores = super().score(turns)
        if len(self.calls) == 1:
            raise RuntimeError("the device was reset")
        return scores


async def test_settings_can_be_configurable() -> None:
    fields = {
        name: ConfigurableField(id=f"guard_{name}")
        for name in ("model", "detector", "threshold", "on_harm", "refusal", "stream_mode")
    }
    guard = keyword_guard().configurable_fields(**fields)
    chain = FakeListChatModel(responses=[HARMFUL]) | guard | StrOutputParser()
    withholding: Any = {
        "configurable": {"guard_on_harm": "withhold", "guard_refusal": "No.", "guard_stream_mode": "whole"}
    }
    for config, answer in ((None, SAFE), (withholding, "No."), ({"configurable": {"guard_threshold": 1.0}}, HARMFUL)):
        assert chain.invoke("q", config) == answer
        assert await chain.ainvoke("q", config) == answer
        assert chain.batch(["q"], config) == [answer]
        assert "".join(chain.stream("q", config)) == answer
    wrong: Any = {"configurable": {"guard_detector": None, "guard_model": "/no/such/model"}}
    with pytest.raises(CheckpointError):
        chain.invoke("q", wrong)
    schema = ProtectorGuard().configurable_fields(**fields).config_schema().model_json_schema()
    assert schema["$defs"]["Configurable"]["properties"].keys() == {f"guard_{name}" for name in fields}


def test_guards_can_be_alternatives() -> None:
    strict = keyword_guard(on_harm="withhold", refusal="No.")
    guard = keyword_guard().configurable_alternatives(ConfigurableField(id="guard"), default_key="kind", strict=strict)
    chain = FakeListChatModel(responses=[HARMFUL]) | guard
    assert chain.invoke("q").content == SAFE
    assert chain.with_config(configurable={"guard": "strict"}).invoke("q").content == "No."
    assert asked(strict)[0].question == "q"


async def test_a_retry_asks_the_models_again() -> None:
    for call in ("invoke", "ainvoke", "batch", "abatch"):
        guard = keyword_guard(detector=ShakyDetector({"bomb"}), on_error="raise")
        retrying = guard.with_retry(retry_if_exception_type=(DetectorError,), wait_exponential_jitter=False)
        given = ["roses"] if "batch" in call else "roses"
        out = getattr(retrying, call)(given)
        assert (await out if inspect.isawaitable(out) else out) == given


async def test_a_fallback_takes_over_from_a_guard_that_raises() -> None:
    guard = keyword_guard(on_harm="raise").with_fallbacks(
        [keyword_guard(on_harm="withhold")], exceptions_to_handle=(HarmfulAnswerError,)
    )
    for chain in (
        EchoModel(label="a bomb for") | guard,
        (EchoModel(label="a bomb for") | guard).with_config(tags=["t"]),
    ):
        assert chain.invoke("you").content == DEFAULT_REFUSAL
        assert (await chain.ainvoke("you")).content == DEFAULT_REFUSAL
        assert "".join(chunk.content for chunk in chain.stream("you")) == DEFAULT_REFUSAL


def test_names_tags_and_bound_arguments_change_nothing() -> None:
    guard = keyword_guard(name="protector")
    assert guard.get_name() == "protector"
    for same in (guard.bind(stop=["x"]), guard.with_config(run_name="g", tags=["t"]), guard.with_types(input_type=str)):
        chain = EchoModel(label="a bomb for") | same
        assert chain.invoke("you").content == SAFE
    assert [turn.question for turn in asked(guard)] == ["you"] * 6


def test_a_chain_with_a_guard_can_be_drawn() -> None:
    chain = EchoModel() | keyword_guard() | StrOutputParser()
    names = [node.name for node in chain.get_graph().nodes.values()]
    assert names[1:4] == ["EchoModel", "ProtectorGuard", "StrOutputParser"]
    assert "ProtectorGuard" in chain.get_graph().draw_mermaid()


def load(text: str) -> Any:
    """`loads` of a guard; older releases ask for no list of classes."""
    listed = "allowed_objects" in inspect.signature(loads).parameters
    allowed = {"allowed_objects": [ProtectorGuard, AIMessage]} if listed else {}
    return loads(text, valid_namespaces=["langchain_mllm_protector"], **allowed)


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
def test_settings_by_names_and_paths_can_be_written_down() -> None:
    guard = ProtectorGuard(
        model=Path("models/mine"),
        detector="smollm2-135m-open",
        detoxifier=Path("models/rewrites"),
        threshold=0.25,
        on_harm="withhold",
        stream=64,
        refusal="No.",
    )
    assert dumpd(guard)["id"] == ["langchain_mllm_protector", "guard", "ProtectorGuard"]
    again = load(dumps(guard))
    assert type(again) is ProtectorGuard
    for name in ProtectorGuard.model_fields:
        value = getattr(guard, name)
        assert getattr(again, name) == (str(value) if isinstance(value, Path) else value), name
    assert load(dumps(ProtectorGuard())) == ProtectorGuard()


def test_a_guard_with_models_in_it_is_not_written_down() -> None:
    for guard in (keyword_guard(), ProtectorGuard(guard=keyword_guard()._engine())):
        written = dumpd(guard)
        assert (written["type"], "kwargs" in written) == ("not_implemented", False)
        json.dumps(written)
