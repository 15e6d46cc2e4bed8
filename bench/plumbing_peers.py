"""Times what a guard adds to a LangChain chain, and builds the guards of other projects with their cheapest check.

`plumbing.py` measures ours with what stands here, and runs this file by the interpreters of the others' environments;
so it needs LangChain, the one package that is measured, and nothing else.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import Context, copy_context
from dataclasses import asdict
from functools import partial
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from rounds import CLOCKS, Spread, alternated

__all__ = ["FORBIDDEN", "GUARDS", "measure"]

FORBIDDEN = "bomb"
"""The word that every guard looks for."""

HARMLESS = "Choose a sunny place, and look at the soil before you buy anything. Water it in the morning. " * 10
HARMFUL = f"Build a {FORBIDDEN}. " * 10
ASKED = "What should I know before I plant a garden?"
BATCH = 64
BLOCK = 20

Wrap = Callable[[Runnable[Any, Any], BaseChatModel], Runnable[Any, Any]]


class InstantModel(BaseChatModel):
    """Says `answer` at once; streamed, word by word."""

    answer: str

    @property
    def _llm_type(self) -> str:
        return "instant"

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=self.answer))])

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate()

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for word in self.answer.split(" "):
            yield ChatGenerationChunk(message=AIMessageChunk(content=f"{word} "))

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream():
            yield chunk


def guardrails_ai(prompt: Runnable[Any, Any], model: BaseChatModel) -> Runnable[Any, Any]:
    """guardrails-ai with a validator that looks for one word, as its guide to LangChain says."""
    from guardrails import Guard
    from guardrails.validator_base import FailResult, PassResult, Validator, register_validator

    @register_validator(name="one-word", data_type="string")
    class OneWord(Validator):
        """Fails on the word."""

        def _validate(self, value: Any, metadata: Any) -> PassResult | FailResult:
            return FailResult(error_message="found") if FORBIDDEN in value else PassResult()

    guard = Guard()
    guard.configure(allow_metrics_collection=False)
    return prompt | model | guard.use(OneWord(on_fail="exception")).to_runnable()


def nemo_guardrails(prompt: Runnable[Any, Any], model: BaseChatModel) -> Runnable[Any, Any]:
    """NeMo Guardrails with its own check by regular expressions, around the model as its guide to LangChain says.

    It is spared the prompt, for behind any step it cannot stream.
    """
    from nemoguardrails import RailsConfig
    from nemoguardrails.integrations.langchain.runnable_rails import RunnableRails

    rails = {
        "config": {"regex_detection": {"output": {"patterns": [FORBIDDEN]}}},
        "output": {"flows": ["regex check output"], "streaming": {"enabled": True, "stream_first": False}},
    }
    return RunnableRails(RailsConfig.from_content(config={"models": [], "rails": rails})) | model


GUARDS: dict[str, Wrap] = {"guardrails-ai": guardrails_ai, "nemoguardrails": nemo_guardrails}
"""The guarded chains of the peers, by the name of the package."""


def measure(wrap: Wrap, *, rounds: int, clock: str, unguarded: Context | None = None) -> dict[str, Any]:
    """Microseconds that a guard adds to each way of calling `prompt | model`, with the spread over rounds.

    They are those of a call, of a chunk of a stream, of an answer of a batch. A way in which the chain fails has an
    `error`, the name of its class, in the place of figures.

    Args:
        wrap: Makes the guarded chain of the prompt and the model.
        rounds: How often each way is timed.
        clock: One of `CLOCKS`.
        unguarded: Where the bare chain runs, if the guard leaves traces in chains that it is no part of.

    Raises:
        RuntimeError: The guard lets the forbidden word through, so it checks nothing.
    """
    prompt = ChatPromptTemplate.from_messages([("human", "{question}")])
    _require_a_check(wrap(prompt, InstantModel(answer=HARMFUL)))
    model = InstantModel(answer=HARMLESS)
    with asyncio.Runner() as runner:
        # In a context of its own, so that neither sees what the other leaves there.
        outside = unguarded or copy_context()
        bare = {way: partial(outside.run, call) for way, call in _ways(prompt | model, runner).items()}
        guarded = _ways(wrap(prompt, model), runner)
        chunks = len(list((prompt | model).stream(ASKED)))
        units = {"invoke": 1, "ainvoke": 1, "stream": chunks, "astream": chunks, "batch": BATCH, "abatch": BATCH}
        return {way: _added(bare[way], guarded[way], units[way], rounds, clock) for way in units}


def _ways(chain: Runnable[Any, Any], runner: asyncio.Runner) -> dict[str, Callable[[], object]]:
    many = [ASKED] * BATCH

    async def streamed() -> int:
        return len([chunk async for chunk in chain.astream(ASKED)])

    return {
        "invoke": lambda: chain.invoke(ASKED),
        "ainvoke": lambda: runner.run(chain.ainvoke(ASKED), context=copy_context()),
        "stream": lambda: len(list(chain.stream(ASKED))),
        "astream": lambda: runner.run(streamed(), context=copy_context()),
        "batch": lambda: chain.batch(many),
        "abatch": lambda: runner.run(chain.abatch(many), context=copy_context()),
    }


def _added(
    bare: Callable[[], object], guarded: Callable[[], object], unit: int, rounds: int, clock: str
) -> dict[str, Any]:
    # A call of a few units is too short to be timed alone: a switch to another program would be all of it.
    calls = max(BLOCK // unit, 1)
    both = {"bare": partial(_repeat, bare, calls), "guarded": partial(_repeat, guarded, calls)}
    try:
        alternated(both, 2)
        found = alternated(both, rounds, clock=CLOCKS[clock])
        left = guarded()
    except Exception as error:
        return {"error": type(error).__name__}
    each = 1e6 / (unit * calls)
    added = Spread.of((b - a) * each for a, b in zip(found["bare"], found["guarded"], strict=True))
    chunks = {"chunks": left} if isinstance(left, int) else {}
    return {"added_us": asdict(added), "bare_us": asdict(Spread.of(t * each for t in found["bare"])), **chunks}


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _require_a_check(chain: Runnable[Any, Any]) -> None:
    try:
        left = chain.invoke(ASKED)
    except Exception:
        return  # a guard may refuse by raising
    if FORBIDDEN in str(left):
        raise RuntimeError("the guard lets the forbidden word through: it checks nothing, and its time means nothing")


def main() -> None:
    """Prints the figures of the peer that is named as JSON: `plumbing_peers.py NAME ROUNDS CLOCK`."""
    os.environ.update(NEMO_GUARDRAILS_NO_USAGE_STATS="1", LANGSMITH_TRACING="false")
    name, rounds, clock = sys.argv[1:]
    figures = measure(GUARDS[name], rounds=int(rounds), clock=clock)
    versions = {package: importlib.metadata.version(package) for package in (name, "langchain-core")}
    print(json.dumps({"versions": versions, "figures": figures}))


if __name__ == "__main__":
    main()
