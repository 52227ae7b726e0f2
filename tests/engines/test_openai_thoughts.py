"""Thoughts behind an API: a question for each field, with the step's pictures, dropped where a step comes."""

from concurrent.futures import CancelledError

import numpy as np
import pytest

from tests.engines.asking import SENTENCES, build_request
from tests.serving import until
from vlm_local.assembly import open_policies
from vlm_local.errors import EngineError, RequestError
from vlm_local.policy_options import PolicyOptions
from vlm_local.types import Observation, Prompt, ThoughtRequest

IMAGE = np.full((16, 16, 3), 9, np.uint8)


def build_thought(after="Why?", **options) -> ThoughtRequest:
    fields = (("TASK", 3), ("PLAN", 4), ("MOVE REASONING", 9))
    return ThoughtRequest(IMAGE, Prompt("Rules.", after), "robot/1", fields, **{"max_tokens": 8, **options})


def list_asked(server) -> list[str]:
    """The last text of each question about a thought."""
    texts = [body["messages"][0]["content"][-1]["text"] for body in server.bodies]
    return [text for text in texts if "next line only" in text]


def test_fields_are_asked_one_by_one_each_behind_those_before(open_engine, server):
    thought = open_engine(server).submit_thought(build_thought()).result(60)
    assert thought.text.splitlines() == [
        "TASK: Sure! The picture",
        "PLAN: Sure! The picture shows",
        "MOVE REASONING: Sure!",
    ]
    assert thought.num_tokens == 8 and thought.ms > 0  # the last field had one token left
    asked = list_asked(server)
    assert [text.splitlines()[-1].rpartition("words: ")[2] for text in asked] == ["TASK:", "PLAN:", "MOVE REASONING:"]
    assert "TASK: Sure! The picture\nPLAN: Sure! The picture shows\n" in asked[2] and asked[0].startswith("\nWhy?")
    assert [part["type"] for part in server.bodies[-1]["messages"][0]["content"]] == ["text", "image_url", "text"]


def test_a_step_drops_the_question_and_the_thought_goes_on_behind_it(open_engine, server):
    engine = open_engine(server)
    engine.generate([build_request()])
    server.slow_s = 0.4
    future = engine.submit_thought(build_thought(max_tokens=3))
    until(lambda: len(list_asked(server)) == 1)
    answer = engine.submit(build_request())
    until(lambda: server.most_at_once == 2)  # the server learns late that the question was dropped
    assert answer.result(60).sentence in SENTENCES and not future.done()
    server.slow_s = 0.0
    assert future.result(60).text == "TASK: Sure! The picture" and len(list_asked(server)) == 2


def test_a_thought_that_is_cancelled_asks_no_more(open_engine, server):
    server.slow_s = 0.2
    future = open_engine(server).submit_thought(build_thought())
    until(lambda: list_asked(server))
    future.cancel()
    with pytest.raises(CancelledError):
        future.result(1)
    num = len(list_asked(server))
    server.slow_s = 0.0
    assert open_engine(server).submit_thought(build_thought(is_awaited=True)).result(60).text
    assert len(list_asked(server)) == num + 3


def test_what_fails_or_would_steer_the_model_is_the_thoughts_own_error(open_engine, server):
    engine = open_engine(server)
    with pytest.raises(RequestError, match="stands for a picture"):
        engine.submit_thought(build_thought("<image>")).result(60)
    server.habit = "500"
    with pytest.raises(EngineError, match="500"):
        engine.submit_thought(build_thought()).result(60)


def test_a_policy_behind_an_api_thinks_and_is_refused_where_the_server_writes_no_text(server):
    options = PolicyOptions(model="tiny", engine="openai", engine_url=server.url, think="ecot", think_tokens=6)
    policies = open_policies(options)
    try:
        policy = policies.build("robot")
        told = [policy.act(Observation(IMAGE, "lift", None, step)).extra.get("reasoning") for step in range(2)]
    finally:
        policies.close()
    assert told == [None, "TASK: Sure! The picture shows a grey"]
    shown = [part.get("text", "") for part in server.bodies[-1]["messages"][0]["content"]]
    assert any("TASK: Sure! The picture shows a grey" in text for text in shown)
    server.habit = "refuses_free"
    policies = open_policies(options)
    with pytest.raises(EngineError, match="422"):
        policies.build("robot")
    policies.close()
