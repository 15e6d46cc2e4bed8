"""A harmful answer in every shape of chain, graph and agent: who sees words of it, and that the README says so."""

from itertools import product
from pathlib import Path

import pytest

from integrations.langchain_leaks import CHAINS, GRAPHS, GUARDS, MODES, seen_in
from integrations.langchain_models import SAFE, keyword_guard
from integrations.langchain_surfaces import CALLS, MARKS, SENTENCES, WORDS, Model, show

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),  # events v3
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning"),  # message histories
]

SHAPES = (*CHAINS, *GRAPHS)
ANSWERS = ("harm first", "harm last")
STREAMS = ("whole", "sentence")

OWN_RUN = {"events v2", "tracers"}
"""Where the run of the model itself is seen."""
KEPT = {*MODES, "checkpointer", "events v3"} - {"custom"}
"""Where the state of a graph is seen, too."""

LEAKS: dict[str, dict[str, set[str]]] = {
    "ProtectorGuard": dict.fromkeys(CHAINS, OWN_RUN)
    | {
        "node": OWN_RUN | {"messages", "events v3"},
        "two nodes": OWN_RUN | KEPT,  # the first puts the answer into the state as it is
        "agent": OWN_RUN | KEPT,  # the guard is behind the agent
    },
    "ProtectorMiddleware": dict.fromkeys(SHAPES, OWN_RUN),
    "ProtectedChatModel": {shape: set() for shape in SHAPES},
}
"""The places where words of a harmful answer are seen all the same."""

CASES = [
    *product(["ProtectorGuard", "ProtectedChatModel"], SHAPES, ANSWERS, STREAMS),
    *product(["ProtectorMiddleware"], SHAPES, ANSWERS, ["whole"]),  # it holds every answer
]


def hidden(says: str, stream: str) -> tuple[str, ...]:
    """Words that may be seen nowhere; harmless sentences before the harm may leave one by one."""
    return WORDS if (says, stream) == ("harm last", "sentence") else (*WORDS, *MARKS)


@pytest.mark.parametrize(("guard", "shape", "says", "stream"), CASES)
async def test_words_of_a_harmful_answer_are_seen_where_the_list_says_and_nowhere_else(
    guard: str, shape: str, says: str, stream: str
) -> None:
    seen = await seen_in(guard, shape, Model(says=says), stream)
    words = hidden(says, stream)
    assert {place for place, text in seen.items() if any(word in text for word in words)} == LEAKS[guard][shape]
    assert [place for place, text in seen.items() if SAFE not in text and place not in LEAKS[guard][shape]] == []


# A model of a chain that failed after its first chunk has no fallback.
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "fallbacks"])
async def test_without_a_guard_they_are_seen_everywhere(shape: str) -> None:
    seen = await seen_in("none", shape, Model(says="harm first"), "whole")
    assert [place for place, text in seen.items() if not all(word in text for word in (*WORDS, *MARKS))] == []


@pytest.mark.parametrize("shape", ["alone", "node", "agent"])
async def test_a_model_that_asks_another_model_is_guarded_too(shape: str) -> None:
    seen = await seen_in("ProtectedChatModel", shape, Model(inside=True, says="harm last"), "whole")
    assert [place for place, text in seen.items() if any(word in text for word in (*WORDS, *MARKS))] == []


@pytest.mark.parametrize("guard", ["ProtectorGuard", "ProtectedChatModel"])
@pytest.mark.parametrize("call", ["stream", "astream"])
async def test_a_stream_by_sentences_lets_harmless_sentences_go_before_the_harm(guard: str, call: str) -> None:
    async def text(says: str, stream: str) -> str:
        setup = GUARDS[guard](Model(says=says), keyword_guard(stream=stream))
        chain = setup.model if setup.behind is None else setup.model | setup.behind
        return "".join(chunk.content for chunk in await show(call, chain, {}))

    # The sentence before the harm waits for what comes after it, and goes with the harm.
    before = "".join(SENTENCES[:2])
    assert await text("harm last", "sentence") == f"{before}\n\n{SAFE}"
    assert await text("harm first", "sentence") == SAFE
    assert await text("harm last", "whole") == SAFE
    assert await text("harm first", "whole") == SAFE


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PLACES = {
    "calls and streams": {*CALLS},
    "message history": {"history"},
    "LangGraph `messages`, events v3": {"messages", "events v3"},
    "other stream modes": {*MODES} - {"messages"},
    "checkpoints": {"checkpointer"},
    "events v2, callbacks, tracers": OWN_RUN,
}
ROWS = {
    "`model \\| ProtectorGuard()`": ("ProtectorGuard", [*CHAINS]),
    "the same inside a graph's node": ("ProtectorGuard", ["node"]),
    "`ProtectorGuard` as a node, or behind an agent": ("ProtectorGuard", ["two nodes", "agent"]),
    "`ProtectorMiddleware` in an agent": ("ProtectorMiddleware", [*SHAPES]),
    "`ProtectedChatModel` anywhere": ("ProtectedChatModel", [*SHAPES]),
}


def shown(guard: str, shapes: list[str], places: set[str]) -> str:
    graph_only, chain_only = places <= KEPT | {"custom"}, places == {"history"}
    if (graph_only and not {*GRAPHS} & {*shapes}) or (chain_only and not {*CHAINS} & {*shapes}):
        return ""
    return "shown" if any(places & LEAKS[guard][shape] for shape in shapes) else "guarded"


def test_the_table_of_the_readme_is_the_list() -> None:
    rows = [["", *PLACES], ["---"] * (1 + len(PLACES))]
    rows += [[row, *(shown(*where, places) for places in PLACES.values())] for row, where in ROWS.items()]
    assert "\n".join(f"| {' | '.join(row)} |" for row in rows) in README
