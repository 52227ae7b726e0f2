"""Several servers behind one engine: who asks which, and what happens when one fails."""

from dataclasses import replace

import pytest

from tests.engines.asking import SENTENCES, ask, build_request
from tests.engines.fake_server import FakeServer
from tests.serving import find_free_port, until
from vlm_local.engines.chat_api import DIALECTS
from vlm_local.engines.openai import OpenAIEngine
from vlm_local.errors import RemoteError


def count_asked(servers):
    return [server.num_asked for server in servers]


def test_robots_are_dealt_out_evenly_and_stay(open_engine):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        for seed in range(3):
            engine.generate([build_request(seed, robot=robot) for robot in "abcd"])
        assert count_asked([one, two]) == [6, 6]
        ask(engine, robot="a")
        assert count_asked([one, two]) == [7, 6]


def test_a_robot_moves_when_its_server_dies_and_comes_back_with_it(open_engine):
    port = find_free_port()
    with FakeServer(port=port) as one, FakeServer() as two:
        engine = open_engine(one, two)
        assert ask(engine, robot="a").sentence in SENTENCES
        one.close()
        for seed in range(3):
            assert ask(engine, seed=seed, robot="a").sentence in SENTENCES
        assert two.num_asked == 3 and engine.metadata["counters"]["retries"] == 1
        assert [server["up"] for server in engine.metadata["servers"]] == [False, True]
        with FakeServer(port=port) as back:
            until(lambda: engine.metadata["servers"][0]["up"])
            ask(engine, robot="a")
            assert (back.num_asked, two.num_asked) == (1, 3)
            assert count_lists(back, SENTENCES) == 2  # before the robot's question, and it


def count_lists(server, sentences):
    return sum(body.get("structured_outputs") == {"choice": list(sentences)} for body in server.bodies)


def test_a_server_that_comes_back_compiles_the_robots_list_and_no_questions(open_engine):
    questions = [(f"red {n}", f"blue {n}") for n in range(70)]
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        ask(engine, robot="a")
        for choices in questions:
            engine.generate([replace(build_request(0, choices), episode=None)])
        one.habit = "drops"
        assert ask(engine, robot="a").sentence in SENTENCES
        before = [count_lists(one, choices) for choices in (SENTENCES, *questions)]
        one.habit = ""
        until(lambda: engine.metadata["servers"][0]["up"])
        after = [count_lists(one, choices) for choices in (SENTENCES, *questions)]
        assert after == [before[0] + 1, *before[1:]]


def test_the_only_server_is_made_ready_again_when_it_comes_back_as_another(open_engine, monkeypatch):
    monkeypatch.setattr("vlm_local.engines.pool._REVIVE_S", 0.1)
    port = find_free_port()
    with FakeServer(port=port) as server:
        engine = open_engine(server)
        ask(engine)
        server.close()
        assert isinstance(ask(engine), RemoteError)
    until(lambda: engine.is_down)
    with FakeServer("sglang", port=port):
        until(lambda: engine.metadata["counters"]["revived"] == 1)
        assert not engine.is_down
        assert engine.metadata["servers"][0]["dialect"] == "sglang-regex"
        assert ask(engine).sentence in SENTENCES


def test_a_question_that_is_too_much_takes_no_server_from_the_robots(open_engine):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        ask(engine, robot="a")
        one.habit = two.habit = "truncates"
        assert isinstance(engine.generate([replace(build_request(0, ("ajar", "shut")), episode=None)])[0], RemoteError)
        assert [server["up"] for server in engine.metadata["servers"]] == [True, True]


@pytest.mark.parametrize("habit", ["401", "500", "drops", "leaves", "truncates", "html"])
def test_a_server_that_misbehaves_is_left_for_the_other_within_the_step(open_engine, habit):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        ask(engine, robot="a")
        one.habit = habit
        assert ask(engine, robot="a").sentence in SENTENCES
        assert count_asked([one, two]) == [2, 1]


def test_a_full_server_is_not_a_dead_one(open_engine):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        one.habit = "429"
        assert ask(engine, robot="a").sentence in SENTENCES
        assert [server["up"] for server in engine.metadata["servers"]] == [True, True]


def test_a_server_that_comes_back_deaf_stays_out(open_engine):
    with FakeServer() as one, FakeServer() as two:
        engine = open_engine(one, two)
        one.habit = "drops"
        ask(engine, robot="a")
        one.habit = "ignores"
        asked = len(one.bodies)
        until(lambda: len(one.bodies) - asked > len(DIALECTS))  # it was tried, and is now tried again
        assert [server["up"] for server in engine.metadata["servers"]] == [False, True] and not engine.is_down


def test_one_of_two_servers_may_be_away_at_the_start(open_engine, server):
    engine = open_engine("http://127.0.0.1:9", server)
    assert ask(engine, robot="a").sentence in SENTENCES
    with pytest.raises(RemoteError, match="is the server running"):
        OpenAIEngine(["http://127.0.0.1:9"], "tiny")
