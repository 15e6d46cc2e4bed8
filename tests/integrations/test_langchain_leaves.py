"""The strings that are found in tool calls and structured answers, and the texts that they are judged as."""

import dataclasses
import enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, AIMessageChunk
from pydantic import BaseModel, ConfigDict, Field

from langchain_mllm_protector.leaves import ALONE_CHARS, MAX_ALONE, PIECE_CHARS, call_leaves, leaves, pieces


def calling(args: dict[str, Any], text: str = "", **fields: Any) -> AIMessage:
    return AIMessage(text, id="m", tool_calls=[{"name": "look_up", "args": args, "id": "c"}], **fields)


class TestLeaves:
    def test_of_all_kinds_of_values_in_order(self) -> None:
        class Color(enum.Enum):
            RED = "red"

        class Plant(BaseModel):
            model_config = ConfigDict(extra="allow")
            name: str
            hidden: str = Field(default="h", exclude=True)
            path: Path = Path("a/b")

        @dataclasses.dataclass(slots=True)
        class Bed:
            plants: list[Plant]
            color: Color

        class Plain:
            def __init__(self) -> None:
                self.note = "plain"

        value = {
            "bed": Bed([Plant(name="rose", more="extra")], Color.RED),
            "two words": (b"bytes", {"set"}, None, True, 3, 2.5),
            "again": ["rose", " ", ValueError("why"), Plain()],
            "message": calling({"q": "call"}, "said"),
        }
        found = ["rose", "h", "a/b", "extra", "red", "two words", "bytes", "set", "why", "plain", "said", "call"]
        assert leaves(value) == found

    def test_of_values_that_hold_themselves_or_are_deep(self) -> None:
        ring: list[object] = ["a"]
        ring.append(ring)
        assert leaves(ring) == ["a"]
        deep: object = "bottom"
        for _ in range(10_000):
            deep = [deep]
        assert leaves(deep) == ["bottom"]

    @pytest.mark.parametrize(
        "message",
        [
            calling({"a": {"b": ["x y", 1]}}),
            AIMessageChunk("", tool_call_chunks=[{"name": "f", "args": '{"a": "x y"}', "id": "c", "index": 0}]),
            AIMessage("", invalid_tool_calls=[{"name": "f", "args": '{"a": "x\\u0020y"}', "id": "c", "error": None}]),
            AIMessage([{"type": "tool_use", "name": "f", "input": {"a": "x y"}, "id": "c"}]),
            AIMessage([{"type": "function_call", "name": "f", "arguments": '{"a": "x y"}', "call_id": "c"}]),
            AIMessage([{"type": "custom_tool_call", "name": "f", "input": "x y"}]),
            AIMessage([{"type": "server_tool_call", "name": "f", "args": {"a": "x y"}, "id": "c"}]),
            AIMessage([{"type": "input_json_delta", "partial_json": '{"a": "x y"}'}]),
            AIMessage("", additional_kwargs={"function_call": {"name": "f", "arguments": '{"a": "x y"}'}}),
            AIMessage("", additional_kwargs={"tool_calls": [{"function": {"name": "f", "arguments": '{"a": "x y"}'}}]}),
        ],
    )
    def test_of_calls_wherever_a_message_holds_them(self, message: AIMessage) -> None:
        assert call_leaves(message) == ["x y"]

    def test_of_a_call_that_is_no_json_are_its_raw_arguments(self) -> None:
        chunk = AIMessageChunk("", tool_call_chunks=[{"name": "f", "args": '{"a": "x", "b": y', "id": "c", "index": 0}])
        assert '{"a": "x", "b": y' in call_leaves(chunk)

    def test_long_ones_are_judged_alone_and_short_ones_together(self) -> None:
        long, longer = "l" * ALONE_CHARS, "m" * 10_000
        short = [f"short {number}" for number in range(50)]
        assert pieces([*short[:25], longer, *short[25:]])[0] == longer
        assert pieces(["a", long, "b"]) == (long, "a\nb")
        assert "\n".join(pieces(short)) == "\n".join(short)
        assert all(PIECE_CHARS - 10 <= len(piece) <= PIECE_CHARS for piece in pieces(short)[:-1])
        assert pieces([]) == ()

    @settings(max_examples=30)
    @given(st.lists(st.integers(1, 300), max_size=400))
    def test_none_is_lost_or_cut_and_the_rows_are_few(self, sizes: list[int]) -> None:
        texts = [chr(0x4E00 + place) * size for place, size in enumerate(sizes)]
        packed = pieces(texts)
        assert sorted("\n".join(packed).split("\n")) == sorted("\n".join(texts).split("\n"))
        assert len(packed) <= 3 * MAX_ALONE + 2

    def test_of_many_long_ones_the_longest_are_judged_alone(self) -> None:
        harm = "a bomb, as the longest string of all says here, " * 3
        packed = pieces([*("roses " * 20 + str(number) for number in range(3 * MAX_ALONE)), harm, "x" * 100_000])
        assert harm in packed
