"""How a chat model is asked for a row, and how its reply becomes one.

As in MLLM-Protector (Pi et al., arXiv 2401.02906, on their training data) a strong chat model writes questions over
many scenarios, and to each a harmful answer and its correction. The harmful one shows the attitude that is to be
stopped; the prompts forbid what would do harm outside of a training file.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from mllm_protector_guard.training.scenarios import Scenario

__all__ = [
    "PROTOCOLS",
    "BadReplyError",
    "Brief",
    "ChatModel",
    "Draft",
    "Messages",
    "ProtocolName",
    "make_brief",
    "prompts",
]

Messages = Sequence[Mapping[str, str]]
"""A chat as `{"role", "content"}` objects."""


class ChatModel(Protocol):
    """Writes the next message of a chat."""

    name: str

    def reply(self, messages: Messages, *, seed: int) -> str:
        """The reply; "" if it was refused or broke off."""
        ...


class BadReplyError(Exception):
    """A reply is no row; the message is one of a few fixed reasons and never holds the reply."""


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=8, max_length=4000)]


class Draft(BaseModel):
    """A generated row.

    Attributes:
        question: What a user asks.
        rejected: An answer that goes along with it.
        accepted: The corrected answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: Text
    rejected: Text
    accepted: Text

    @model_validator(mode="after")
    def _is_corrected(self) -> Self:
        if self.rejected.casefold() == self.accepted.casefold():
            raise ValueError("accepted is the same as rejected")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """What one row is to be about.

    Attributes:
        scenario: The field of harm.
        language: Of the question and the answers, as it is to be named to the model.
        asker: Who asks.
        form: How.
        image: Whether the question is about an image that comes with it.
    """

    scenario: Scenario
    language: str
    asker: str
    form: str
    image: bool


_ASKERS = (
    "a teenager", "a worried parent", "a shopkeeper", "a student", "a retired neighbour", "an office worker",
    "a traveller", "a tenant", "somebody who is angry at a former friend", "somebody who is short of money",
    "a hobbyist", "a small landlord", "a night-shift worker", "a new employee",
)  # fmt: skip
_FORMS = (
    "in one plain sentence", "politely and at some length", "bluntly", "as part of a story they say they write",
    "as a hypothetical case", "with a harmless reason given for it", "as a follow-up to an earlier chat",
    "in a casual tone with a typing error or two",
)  # fmt: skip


def make_brief(scenario: Scenario, languages: Sequence[str], key: str) -> Brief:
    """The brief of one row; the same key draws the same one."""
    rng = random.Random(key)  # noqa: S311
    return Brief(
        scenario=scenario,
        language=rng.choice(languages),
        asker=rng.choice(_ASKERS),
        form=rng.choice(_FORMS),
        image=rng.random() < 0.5,
    )


_SYSTEM = (
    "You write training rows for a safety filter that reads the answers of chat models and corrects the harmful ones. "
    "The filter must know what it is to stop, so one answer of each row goes along with a bad request. That answer is "
    "harmful in its attitude alone: it holds no working instructions, amounts, code, addresses or contacts, no real "
    "people, and nothing sexual about minors."
)
_REJECTED = (
    "a careless assistant goes along with the question: eager, on the side of the harm, and vague wherever a detail "
    "would help anybody to do it"
)
_ACCEPTED = (
    "names the concern in the question's own terms, declines the harmful part alone, and gives the safe help that "
    "is left"
)


def _topic(brief: Brief) -> str:
    return f"{brief.scenario.name.replace('_', ' ')}: {brief.scenario.description}"


def _json_prompt(brief: Brief) -> Messages:
    image = " The question is about a picture that comes with it; it does not describe the picture." * brief.image
    request = (
        f"Scenario: {_topic(brief)}\n"
        f"Write one row about it in {brief.language}. The question is asked by {brief.asker}, {brief.form}.{image}\n"
        "Reply with one JSON object and nothing else. It has exactly these fields, all of them strings:\n"
        '"question": the question, as the user would type it;\n'
        f'"rejected": 40 to 90 words in which {_REJECTED};\n'
        f'"accepted": 40 to 90 words, the corrected answer to the same question, which {_ACCEPTED}.'
    )
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": request}]


def _ask_for_json(brief: Brief, chat: ChatModel, seed: int) -> Draft:
    reply = _replied(chat, _json_prompt(brief), seed)
    try:
        # Models put code fences and words around their JSON, and line feeds into its strings.
        fields = json.loads(reply[reply.index("{") : reply.rindex("}") + 1], strict=False)
    except (ValueError, RecursionError):
        raise BadReplyError("not JSON") from None
    try:
        return Draft.model_validate(fields)
    except ValidationError:
        raise BadReplyError("wrong fields") from None


def _ask_in_steps(brief: Brief, chat: ChatModel, seed: int) -> Draft:
    """Three short prompts, for models too small to write JSON."""
    picture = " about a picture" * brief.image
    end = f"Write in {brief.language}. Reply with the"
    question = _step(
        chat,
        f"Topic: {_topic(brief)}\n"
        f"Write one question{picture} on this topic that {brief.asker} could ask, {brief.form}. {end} question only.",
        seed,
    )
    rejected = _step(
        chat,
        f"Question: {question}\n"
        f"Write two or three sentences in which {_REJECTED}. Give no instructions. {end} answer only.",
        seed + 1,
    )
    accepted = _step(
        chat,
        f"Question: {question}\nBad answer: {rejected}\n"
        f"Write a better answer of two to four sentences that {_ACCEPTED}. {end} answer only.",
        seed + 2,
    )
    try:
        return Draft(question=question, rejected=rejected, accepted=accepted)
    except ValidationError:
        raise BadReplyError("wrong texts") from None


_LABEL = re.compile(r"^\W*(?:the |better |bad )*(?:question|answer)\W*:\W*", re.IGNORECASE)


def _step(chat: ChatModel, prompt: str, seed: int) -> str:
    reply = _replied(chat, [{"role": "user", "content": prompt}], seed)
    text = _LABEL.sub("", reply).strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text


def _replied(chat: ChatModel, messages: Messages, seed: int) -> str:
    reply = chat.reply(messages, seed=seed)
    if not reply.strip():
        raise BadReplyError("empty or broken off")
    return reply


ProtocolName = Literal["json", "plain"]
PROTOCOLS: Mapping[ProtocolName, Callable[[Brief, ChatModel, int], Draft]] = {
    "json": _ask_for_json,
    "plain": _ask_in_steps,
}
"""Ways to ask for a draft: one prompt for a JSON object, or three short ones for plain text."""


class _Recorder:
    """Takes down the prompts; its replies are marks."""

    name = "nobody"

    def __init__(self) -> None:
        self.prompts: list[Messages] = []

    def reply(self, messages: Messages, *, seed: int) -> str:
        self.prompts.append(messages)
        return f"<reply {len(self.prompts)}>"


def prompts(brief: Brief, protocol: ProtocolName) -> list[Messages]:
    """The prompts of a brief, with `<reply N>` where the text of an earlier reply will stand; asks nobody."""
    recorder = _Recorder()
    with contextlib.suppress(BadReplyError):  # the marks are no row
        PROTOCOLS[protocol](brief, recorder, 0)
    return recorder.prompts
