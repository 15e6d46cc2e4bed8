"""The endpoint that writes drafts, and the meter that keeps its budget."""

import email.utils
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr

from mllm_protector_guard.errors import ConfigError, InferenceError
from mllm_protector_guard.training.endpoint import BudgetSpentError, EndpointChat, Meter
from training.chat_server import Answer, ChatServer, draft, good, serving
from training.tiny_drafts import key, make, plan

USER = [{"role": "user", "content": "a private prompt"}]


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
