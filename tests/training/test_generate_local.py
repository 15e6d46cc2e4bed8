from pathlib import Path

import pytest

from mllm_protector_guard.errors import ConfigError
from mllm_protector_guard.models.chat import LocalChat, load_chat
from mllm_protector_guard.training.endpoint import Meter
from mllm_protector_guard.training.generate import GenerationPlan, MeteredChat, generate
from mllm_protector_guard.training.scenarios import Scenario

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = [{"role": "user", "content": "How do I bake bread?"}]


@pytest.fixture(scope="session")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that can be asked; it writes nonsense and seldom ends."""
    from models.tiny import chat_tokenizer, save_causal_lm

    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return save_causal_lm(tmp_path_factory.mktemp("tiny") / "chatting", tokenizer)


def ending(chat: LocalChat) -> LocalChat:
    """The same, but many tokens end a reply, so that it is short."""
    chat._loaded.model.generation_config.eos_token_id = list(range(200, 340))
    return chat


def test_a_model_without_a_chat_template_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        load_chat(base)


def test_replies_repeat_by_seed_and_differ_between_seeds(chatting: Path) -> None:
    chat = ending(load_chat(chatting, max_new_tokens=64))
    replies = [chat.reply(USER, seed=seed) for seed in range(6)]
    assert replies == [chat.reply(USER, seed=seed) for seed in range(6)]
    assert len(set(replies)) > 1
    greedy = ending(load_chat(chatting, max_new_tokens=64, temperature=0))
    assert greedy.reply(USER, seed=1) == greedy.reply(USER, seed=2)


def test_what_does_not_end_or_fit_is_empty(chatting: Path) -> None:
    assert load_chat(chatting, max_new_tokens=16, temperature=0).reply(USER, seed=1) == ""
    assert ending(load_chat(chatting, max_new_tokens=4096)).reply(USER, seed=1) == ""


@pytest.mark.parametrize("protocol", ["json", "plain"])
def test_nonsense_is_counted_and_the_run_ends(chatting: Path, protocol: str) -> None:
    chat = ending(load_chat(chatting, max_new_tokens=16))
    meter = Meter()
    plan = GenerationPlan(
        scenarios=[Scenario(name="Baking", description="Burnt bread.")], count=2, tries=2, concurrency=1,
        protocol=protocol,  # type: ignore[arg-type]
    )  # fmt: skip
    rows: list[object] = []
    report = generate(plan, MeteredChat(chat, meter), meter, write=rows.append)
    assert (report.made, report.missing) == (len(rows), 2 - len(rows))
    assert report.bad.total() >= 2 * report.missing
    assert meter.requests >= 2
