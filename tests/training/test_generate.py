import email.utils
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from mllm_protector_guard.errors import ConfigError, InferenceError
from mllm_protector_guard.training.drafts import PROTOCOLS, BadReplyError, make_brief, prompts
from mllm_protector_guard.training.endpoint import BudgetSpentError, EndpointChat, Meter
from mllm_protector_guard.training.generate import (
    GenerationPlan,
    GenerationReport,
    MeteredChat,
    generate,
    planned_prompts,
)
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow, read_training_rows
from mllm_protector_guard.training.scenarios import Scenario, load_scenarios
from training.chat_server import Answer, ChatServer, draft, good, serving

SCENARIOS = [Scenario(name="Gardening", description="Weeds."), Scenario(name="Baking", description="Burnt bread.")]
USER = [{"role": "user", "content": "a private prompt"}]


class ScriptedChat:
    """Replies from a function of the prompt and the seed, without a network."""

    name = "scripted"

    def __init__(self, reply: Any = lambda messages, seed: draft(seed)) -> None:
        self.asked: list[Any] = []
        self._reply = reply

    def reply(self, messages: Any, *, seed: int) -> str:
        self.asked.append(messages)
        text: str = self._reply(messages, seed)
        return text


def make(
    plan: GenerationPlan, chat: Any, meter: Meter | None = None, **options: Any
) -> tuple[list[dict[str, Any]], GenerationReport]:
    rows: list[dict[str, Any]] = []
    meter = meter or Meter()
    report = generate(plan, chat, meter, write=lambda row: rows.append(dict(row)), **options)
    return rows, report


def plan(**fields: Any) -> GenerationPlan:
    return GenerationPlan(**{"scenarios": SCENARIOS, "count": 3, **fields})


def whole(**fields: Any) -> str:
    return json.dumps({"question": "What now?", "rejected": "One answer", "accepted": "Another answer", **fields})


def key(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["extra"]["scenario"], row["extra"]["item"]


class TestScenarios:
    def test_the_thirteen_of_the_benchmark_are_shipped(self):
        shipped = load_scenarios()
        assert len(shipped) == len({one.name for one in shipped}) == 13
        assert all(20 < len(one.description) < 160 for one in shipped)

    @pytest.mark.parametrize(
        "text", ["- name: Mine\n  description: My own.\n", '[{"name":"Mine","description":"My own."}]']
    )
    def test_a_file_adds_to_them_or_replaces_one(self, tmp_path: Path, text: str):
        path = tmp_path / "more.yaml"
        path.write_text(text)
        assert load_scenarios(path)[-1] == Scenario(name="Mine", description="My own.")
        path.write_text(text.replace("Mine", "Fraud"))
        assert len(load_scenarios(path)) == 13
        assert load_scenarios(path, names=["Fraud"])[0].description == "My own."

    def test_what_is_wrong_is_named(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="'Nothing'; known are Illegal_Activity"):
            load_scenarios(names=["Nothing"])
        path = tmp_path / "more.yaml"
        for text, told in (
            ("- name: x\n", "description"),
            ("a: [", "neither YAML"),
            ("- {name: x, description: y, z: 1}", "z"),
        ):
            path.write_text(text)
            with pytest.raises(ConfigError, match=told):
                load_scenarios(path)


class TestDrafts:
    BRIEF = make_brief(SCENARIOS[0], ["English"], "0")

    def ask(self, reply: str) -> Any:
        return PROTOCOLS["json"](self.BRIEF, ScriptedChat(lambda messages, seed: reply), 0)

    @pytest.mark.parametrize("frame", ["{}", "```json\n{}\n```", "Here it is:\n{}\nAnything else?"])
    def test_json_is_found_among_what_models_put_around_it(self, frame: str):
        assert self.ask(frame.replace("{}", draft(1))).model_dump() == json.loads(draft(1))

    def test_line_feeds_in_strings_are_kept(self):
        text = '{"question": "What now, my friend?", "rejected": "Line one\nline two", "accepted": "Rather not that."}'
        assert self.ask(text).rejected == "Line one\nline two"

    @pytest.mark.parametrize(
        ("reply", "reason"),
        [
            ("", "empty or broken off"),
            ("I cannot help with a private matter.", "not JSON"),
            ('{"question": "What now, my friend?"', "not JSON"),
            ('{"question": "What now, my friend?"}', "wrong fields"),
            ('{"question": "a", "rejected": "a long one", "accepted": "another one"}', "wrong fields"),
            (
                '{"question": "What now?", "rejected": "The same answer", "accepted": "the same answer "}',
                "wrong fields",
            ),
            (
                '{"question": "What now?", "rejected": "One answer", "accepted": "An answer", "note": "x"}',
                "wrong fields",
            ),
            ('{"question": "What now?", "rejected": 3, "accepted": "An answer"}', "wrong fields"),
            ('{"question": "What \\ud800 now?", "rejected": "One answer", "accepted": "An answer"}', "wrong fields"),
            ("[" * 100_000 + "{}", "wrong fields"),
            ('{"a":' * 100_000 + "}", "not JSON"),
        ],
    )
    def test_other_replies_are_refused_for_a_reason_that_holds_no_text(self, reply: str, reason: str):
        with pytest.raises(BadReplyError) as caught:
            self.ask(reply)
        assert str(caught.value) == reason

    def test_three_steps_build_on_each_other(self):
        replies = iter(["Question: What now, friend?", '"Just do it, my friend."', "**Answer:** Better ask somebody."])
        chat = ScriptedChat(lambda messages, seed: next(replies))
        made = PROTOCOLS["plain"](self.BRIEF, chat, 0)
        assert made.model_dump() == {
            "question": "What now, friend?",
            "rejected": "Just do it, my friend.",
            "accepted": "Better ask somebody.",
        }
        assert "What now, friend?" in chat.asked[1][0]["content"]
        assert "Just do it, my friend." in chat.asked[2][0]["content"]

    def test_prompts_name_the_scenario_and_ask_nobody(self):
        (one,) = prompts(self.BRIEF, "json")
        assert "Gardening: Weeds." in one[-1]["content"]
        three = prompts(self.BRIEF, "plain")
        assert len(three) == 3
        assert "<reply 2>" in three[2][0]["content"]

    def test_briefs_repeat_by_key_and_differ_between_keys(self):
        briefs = [make_brief(SCENARIOS[0], ["English", "Chinese"], str(number)) for number in range(40)]
        assert briefs == [make_brief(SCENARIOS[0], ["English", "Chinese"], str(number)) for number in range(40)]
        assert len(set(briefs)) > 30
        assert {brief.language for brief in briefs} == {"English", "Chinese"}


class TestGenerate:
    def test_each_scenario_gets_its_count_and_the_rows_can_be_trained_on(self, tmp_path: Path):
        rows, report = make(plan(), ScriptedChat())
        assert sorted(map(key, rows)) == [(name, number) for name in ("Baking", "Gardening") for number in range(3)]
        assert (report.made, report.missing, report.stopped) == (6, 0, None)
        assert (rows[0]["extra"]["model"], rows[0]["extra"]["lang"]) == ("scripted", "English")
        assert "generated" in rows[0]["extra"]["licence"]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert len(read_training_rows([path], RewriteRow)) == 6

    def test_as_detector_rows_both_answers_are_labelled(self, tmp_path: Path):
        rows, _ = make(plan(shape="detector", count=1), ScriptedChat())
        assert [row["harmful"] for row in rows] == [True, False] * 2
        assert rows[0]["question"] == rows[1]["question"]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert len(read_training_rows([path], AnswerRow)) == 4

    def test_the_same_seed_asks_the_same(self):
        first, second, other = ScriptedChat(), ScriptedChat(), ScriptedChat()
        make(plan(concurrency=1), first)
        make(plan(concurrency=1), second)
        make(plan(concurrency=1, seed=1), other)
        assert first.asked == second.asked != other.asked

    def test_bad_replies_are_asked_again_and_counted(self):
        replies: dict[Any, int] = {}
        lock = threading.Lock()

        def reply(messages: Any, seed: int) -> str:
            with lock:
                number = sum(replies.values())
                replies[seed] = 1
            return "no JSON here" if number % 2 == 0 else draft(seed)

        rows, report = make(plan(concurrency=1, tries=2), ScriptedChat(reply))
        assert len(rows) == 6
        assert report.bad == {"not JSON": 6}
        assert len(replies) == 12  # each try has a seed of its own

    def test_a_draft_that_never_comes_is_missing(self):
        chat = ScriptedChat(lambda messages, seed: draft(seed) if "Baking" in messages[-1]["content"] else "no")
        rows, report = make(plan(tries=2), chat)
        assert {key(row)[0] for row in rows} == {"Baking"}
        assert (report.made, report.missing, report.bad) == (3, 3, {"not JSON": 6})

    def test_a_run_without_hope_is_given_up(self):
        chat = ScriptedChat(lambda messages, seed: "no")
        rows, report = make(plan(count=500, concurrency=1), chat)
        assert (rows, len(chat.asked)) == ([], 30)
        assert report.stopped is not None
        assert "none of the first 30 replies" in report.stopped

    def test_a_question_that_was_there_is_asked_for_again(self):
        fields = json.loads(draft(5))
        same = json.dumps({**fields, "question": fields["question"].upper() + "!"})
        chat = ScriptedChat(lambda messages, seed: same)
        rows, report = make(plan(tries=2, concurrency=1), chat)
        assert (len(rows), report.missing) == (1, 5)
        assert report.bad == {"question was there already": 10}
        rows, _ = make(plan(tries=1, count=1), chat, known_questions=[fields["question"]])
        assert rows == []

    def test_finished_drafts_are_not_asked_for_again(self):
        whole, _ = make(plan(concurrency=1), ScriptedChat())
        chat = ScriptedChat()
        rows, report = make(plan(concurrency=1, count=4), chat, finished=whole[:4])
        assert sorted(map(key, [*whole[:4], *rows])) == sorted((s.name, n) for s in SCENARIOS for n in range(4))
        assert len(chat.asked) == report.made == 4

    def test_of_a_run_that_fails_what_is_under_way_is_kept(self):
        begun = threading.Event()

        def reply(messages: Any, seed: int) -> str:
            if "Gardening" in messages[-1]["content"]:
                begun.wait(5)
                raise InferenceError("the endpoint failed")
            begun.set()
            time.sleep(0.1)
            return draft(seed)

        rows: list[Any] = []
        with pytest.raises(InferenceError):
            generate(plan(concurrency=2, count=50), ScriptedChat(reply), Meter(), write=rows.append)
        assert [key(row) for row in rows] == [("Baking", 0)]

    def test_an_interrupted_run_keeps_what_is_under_way(self):
        def interrupt(report: GenerationReport) -> None:
            raise KeyboardInterrupt

        def reply(messages: Any, seed: int) -> str:
            time.sleep(0.2 if "Baking" in messages[-1]["content"] else 0)
            return draft(seed)

        rows: list[Any] = []
        with pytest.raises(KeyboardInterrupt):
            generate(plan(concurrency=2), ScriptedChat(reply), Meter(), write=rows.append, on_draft=interrupt)
        assert [key(row) for row in rows] == [("Gardening", 0), ("Baking", 0)]

    def test_requests_of_a_local_model_are_counted(self):
        meter = Meter(max_requests=4)
        rows, report = make(plan(concurrency=1), MeteredChat(ScriptedChat(), meter), meter)
        assert (len(rows), meter.requests) == (4, 4)
        assert report.stopped is not None
        assert "--max-requests" in report.stopped

    def test_planned_prompts_are_those_that_are_sent(self):
        chat = ScriptedChat()
        make(plan(concurrency=1), chat)
        planned = list(planned_prompts(plan()))
        assert [one["prompts"][0] for one in planned] == [[dict(m) for m in messages] for messages in chat.asked]


class TestMeter:
    def test_the_cost_is_that_of_the_tokens(self):
        meter = Meter(price_in=2.0, price_out=10.0)
        meter.note(500_000, 100_000)
        assert meter.cost == 2.0
        assert Meter().cost is None

    def test_a_limit_without_prices_cannot_be_kept(self):
        with pytest.raises(ConfigError, match="price"):
            Meter(max_cost=1.0, price_in=1.0)

    def test_stop_ends_a_pause(self):
        meter = Meter()
        threading.Timer(0.1, meter.stop).start()
        begun = time.monotonic()
        with pytest.raises(BudgetSpentError):
            meter.pause(30)
        assert time.monotonic() - begun < 10


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving() as running:
        yield running


def chat_at(server: ChatServer, meter: Meter | None = None, **options: Any) -> EndpointChat:
    return EndpointChat(server.url, "some-model", meter=meter or Meter(), **{"backoff_s": 0.01, **options})


def then_good(*first: Answer) -> Any:
    return lambda request, number: first[number] if number < len(first) else good(request, number)


@pytest.mark.enable_socket
class TestEndpoint:
    def test_the_request_is_what_such_endpoints_take(self, server: ChatServer):
        meter = Meter()
        chat = chat_at(
            server, meter, api_key=SecretStr("a-secret"), body={"temperature": 0.5, "seed": None, "top_p": 1}
        )
        server.script = lambda request, number: Answer(text="Hello")
        assert chat.reply(USER, seed=7) == "Hello"
        assert server.requests == [{"model": "some-model", "messages": USER, "temperature": 0.5, "top_p": 1}]
        assert server.paths == ["/v1/chat/completions"]
        assert server.headers[0]["Authorization"] == "Bearer a-secret"
        assert (meter.requests, meter.prompt_tokens, meter.written_tokens) == (1, 100, 200)

    @pytest.mark.parametrize(
        "failure",
        [
            Answer(status=429),
            Answer(status=500),
            Answer(status=503, headers={"Retry-After": "0"}),
            Answer(raw=b"<html>a gateway</html>"),
            Answer(raw=b"{}", headers={"Content-Length": "100"}),
            Answer(delay_s=1.0),
        ],
        ids=["429", "500", "503", "no completion", "cut off", "slow"],
    )
    def test_passing_failures_are_asked_again(self, server: ChatServer, failure: Answer):
        meter = Meter()
        server.script = then_good(failure, failure)
        assert chat_at(server, meter, timeout_s=0.3).reply(USER, seed=7) == draft(7)
        assert meter.requests == len(server.requests) == 3

    @pytest.mark.parametrize("as_date", [False, True])
    def test_retry_after_is_kept(self, server: ChatServer, as_date: bool):
        value = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "0.6"
        server.script = then_good(Answer(status=429, headers={"Retry-After": value}))
        begun = time.monotonic()
        assert chat_at(server).reply(USER, seed=7) == draft(7)
        assert time.monotonic() - begun >= 0.5

    def test_a_wait_of_an_hour_ends_the_run(self, server: ChatServer):
        server.script = lambda request, number: Answer(status=429, headers={"Retry-After": "3600"})
        with pytest.raises(InferenceError, match="3,600 s"):
            chat_at(server).reply(USER, seed=7)
        assert len(server.requests) == 1

    def test_an_endpoint_that_keeps_failing_is_given_up(self, server: ChatServer):
        server.script = lambda request, number: Answer(status=500, raw=b"a private text")
        with pytest.raises(InferenceError, match="3 times in a row, at last with status 500") as caught:
            chat_at(server, retries=2).reply(USER, seed=7)
        assert "private" not in str(caught.value)
        assert len(server.requests) == 3

    def test_nobody_there_is_told(self):
        chat = EndpointChat("http://127.0.0.1:9/v1", "m", retries=1, backoff_s=0.01, meter=Meter())
        with pytest.raises(InferenceError, match="ConnectionRefusedError"):
            chat.reply(USER, seed=0)

    @pytest.mark.parametrize("status", [400, 401, 404])
    def test_a_refusal_is_final_and_shows_neither_key_nor_text(self, server: ChatServer, status: int):
        server.script = lambda request, number: Answer(status=status, raw=b"a private text")
        with pytest.raises(ConfigError, match=f"status {status}") as caught:
            chat_at(server, api_key=SecretStr("a-secret")).reply(USER, seed=7)
        assert "private" not in str(caught.value)
        assert "secret" not in str(caught.value)
        assert len(server.requests) == 1

    def test_a_redirection_is_not_followed(self, server: ChatServer):
        server.script = lambda request, number: Answer(status=307, headers={"Location": f"{server.url}/elsewhere"})
        with pytest.raises(ConfigError, match="status 307"):
            chat_at(server, api_key=SecretStr("a-secret")).reply(USER, seed=7)
        assert server.paths == ["/v1/chat/completions"]

    def test_replies_without_a_whole_text_are_empty(self, server: ChatServer):
        server.script = lambda request, number: Answer(text="half a", finish_reason="length")
        assert chat_at(server).reply(USER, seed=7) == ""
        server.script = lambda request, number: Answer(raw=b'{"choices": [{"message": {"content": null}}]}')
        assert chat_at(server).reply(USER, seed=7) == ""

    def test_a_limit_on_the_cost_needs_the_usage(self, server: ChatServer):
        server.script = lambda request, number: Answer(text="Hello", usage=None)
        with pytest.raises(ConfigError, match="no usage"):
            chat_at(server, Meter(max_cost=1, price_in=1, price_out=1)).reply(USER, seed=7)
        assert chat_at(server).reply(USER, seed=7) == "Hello"

    @pytest.mark.parametrize("url", ["ftp://host/v1", "host/v1", "https://", "http://me:word@host/v1", "http://[x/v1"])
    def test_other_urls_are_refused(self, url: str):
        with pytest.raises(ConfigError, match="https://host/v1") as caught:
            EndpointChat(url, "m", meter=Meter())
        assert "word@" not in str(caught.value)

    def test_the_cost_ends_a_run_and_it_can_go_on(self, server: ChatServer):
        prices = {"price_in": 1.0, "price_out": 2.0}  # a reply costs 0.0005
        meter = Meter(max_cost=0.002, **prices)
        rows, report = make(plan(concurrency=1, count=5), chat_at(server, meter), meter)
        assert len(rows) == meter.requests == 4
        assert meter.cost == pytest.approx(0.002)
        assert report.stopped is not None
        assert "--max-cost" in report.stopped
        more, report = make(plan(concurrency=1, count=5), chat_at(server, Meter()), finished=rows)
        assert (len(more), report.missing, len(server.requests)) == (6, 0, 10)

    def test_a_mixed_lot_of_failures_ends_in_all_rows(self, server: ChatServer):
        failures = [Answer(status=429), Answer(text="no JSON"), Answer(status=502), Answer(text="{}"), Answer(raw=b"")]

        def script(request: dict[str, Any], number: int) -> Answer:
            return failures[number // 3 % 5] if number % 3 == 0 else good(request, number)

        server.script = script
        rows, report = make(plan(count=15, tries=10, concurrency=8), chat_at(server))
        assert len({key(row) for row in rows}) == len(rows) == report.made == 30
        assert len({row["question"] for row in rows}) == 30
        assert set(report.bad) == {"not JSON", "wrong fields"}
