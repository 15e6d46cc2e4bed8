import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mllm_protector_guard.errors import ConfigError, InferenceError
from mllm_protector_guard.training.drafts import PROTOCOLS, BadReplyError, make_brief, prompts
from mllm_protector_guard.training.endpoint import Meter
from mllm_protector_guard.training.generate import (
    GenerationReport,
    MeteredChat,
    generate,
    planned_prompts,
)
from mllm_protector_guard.training.rows import AnswerRow, RewriteRow, read_training_rows
from mllm_protector_guard.training.scenarios import Scenario, load_scenarios
from training.chat_server import draft
from training.tiny_drafts import SCENARIOS, key, make, plan

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


def whole(**fields: Any) -> str:
    return json.dumps({"question": "What now?", "rejected": "One answer", "accepted": "Another answer", **fields})


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
