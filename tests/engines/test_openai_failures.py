"""How an engine behind an API fails: by kind, within its deadline, each request alone."""

import gc
import json
import logging
import threading
import time
import weakref
from dataclasses import replace

import pytest

from tests.engines.asking import SENTENCES, ask, build_request
from tests.serving import until
from vlm_local.engines.openai import OpenAIEngine
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import EngineError, RemoteError


@pytest.mark.parametrize(
    ("habit", "kind", "words"),
    [
        ("401", "unauthorized", "OPENAI_API_KEY"),
        ("404", "not_found", "--model"),
        ("429", "rate_limited", "429"),
        ("500", "server_error", "500"),
        ("drops", "connection", "cannot be reached"),
        ("html", "malformed", "no chat completion"),
        ("leaves", "outside_grammar", "fly away"),
        ("truncates", "truncated", "finish_reason 'length'"),
        ("too_many", "refused", "Enum has more values"),
    ],
)
def test_each_failure_has_its_own_error_and_counter(open_engine, server, habit, kind, words):
    engine = open_engine(server)
    ask(engine)
    server.habit = habit
    before = len(server.bodies)
    outcome = ask(engine, side=100)
    assert isinstance(outcome, RemoteError) and outcome.kind == kind and words in str(outcome)
    # What is refused is asked once more, without optional fields.
    tries = 2 if kind in ("connection", "server_error", "refused") else 1
    assert engine.metadata["counters"][kind] == len(server.bodies) - before == tries
    server.habit = ""
    assert ask(engine).sentence in SENTENCES


@pytest.mark.parametrize("habit", ["slow", "drips"])
def test_the_deadline_holds_and_nothing_is_asked_after_it(open_engine, server, habit):
    engine = open_engine(server, deadline_ms=400)
    ask(engine)
    server.habit, server.slow_s = habit, 4.0 if habit == "slow" else 0.0
    asked, late = len(server.bodies), engine.metadata["counters"]["timeout"]
    outcome = ask(engine)
    assert isinstance(outcome, RemoteError) and outcome.kind == "timeout"  # an answer 4 s later would be another
    server.habit, server.slow_s = "", 0.0
    time.sleep(0.3)
    assert len(server.bodies) - asked <= 1
    assert engine.metadata["counters"]["timeout"] - late == 1


@pytest.mark.parametrize("habit", ["drips", "drips_models"])
def test_a_server_that_drips_cannot_hold_the_start(server, habit, monkeypatch):
    monkeypatch.setattr("vlm_local.engines.remote._START_S", 0.5)
    monkeypatch.setattr("vlm_local.engines.remote._LIST_S", 0.5)
    server.habit = habit
    with pytest.raises(RemoteError, match=r"gave no answer within 0.5 s"):
        OpenAIEngine([server.url], "tiny")


def test_a_question_that_is_never_answered_holds_no_robot(open_engine, server):
    worker = EngineWorker(lambda: open_engine(server, deadline_ms=600_000), warm_up=[build_request(0)])
    worker.wait_loaded()
    waiting = threading.Event()

    def drips(body):
        asked = "ajar" in json.dumps(body.get("structured_outputs"))
        if asked:
            waiting.set()
        return asked

    server.drips = drips
    question = replace(build_request(0, ("ajar", "shut")), episode=None)
    outcome = []

    def put():
        with pytest.raises(EngineError) as raised:
            worker.generate(question)
        outcome.append(raised.value)

    thread = threading.Thread(target=put)
    thread.start()
    try:
        assert waiting.wait(60)
        for seed in range(4):
            assert worker.generate(build_request(seed)).sentence in SENTENCES
        assert not outcome
    finally:
        worker.close(10)
        thread.join(60)
    assert isinstance(outcome[0], EngineError)  # it was failed by the end, not by an answer


@pytest.mark.parametrize(
    "habit",
    ["refuses_logprobs", "refuses_logprobs_by_500", "refuses_new_limit", *(f"garbled{i}" for i in range(7))],
)
def test_optional_fields_that_turn_out_unwanted_cost_no_step(open_engine, server, habit):
    engine = open_engine(server)
    assert ask(engine).probabilities is not None
    server.habit = habit
    outcome = ask(engine, seed=1)
    assert outcome.sentence in SENTENCES and outcome.probabilities is None
    server.habit = ""
    assert ask(engine).probabilities is not None


def test_a_server_that_starts_without_readable_numbers_is_used_without(open_engine, server):
    server.habit = "refuses_logprobs_by_500"
    outcome = ask(open_engine(server))
    assert outcome.sentence in SENTENCES and outcome.probabilities is None


def test_one_dropped_connection_costs_one_retry_and_no_fault(open_engine, server):
    engine = open_engine(server)
    ask(engine)
    server.habit = "drops_once"
    assert ask(engine).sentence in SENTENCES
    assert engine.metadata["counters"]["retries"] == engine.metadata["counters"]["connection"] == 1


def test_a_failed_request_spoils_no_other_and_is_asked_no_third_time(open_engine, server):
    worker = EngineWorker(lambda: open_engine(server))
    worker.wait_loaded()
    server.habit = "too_many"
    try:
        engine = open_engine(server)
        outcomes = engine.generate([build_request(0), build_request(1, side=100), build_request(2)])
        assert [isinstance(outcome, RemoteError) for outcome in outcomes] == [False, True, False]
        before = server.num_asked
        with pytest.raises(RemoteError, match="Enum has more values"):
            worker.generate(build_request(3, side=100))
        assert server.num_asked - before == 2
    finally:
        worker.close()


def test_requests_of_a_batch_travel_together(open_engine, server):
    engine = open_engine(server)
    ask(engine)
    server.gather(8)
    outcomes = engine.generate([build_request(seed) for seed in range(8)])
    assert server.most_at_once == 8
    alone = [ask(engine, seed=seed).sentence for seed in range(2)]
    assert [outcome.sentence for outcome in outcomes[:2]] == alone


@pytest.mark.parametrize("habit", ["429", "drops", "html", "truncates"])
def test_a_failure_lets_go_of_its_picture_at_once(open_engine, server, habit, caplog):
    """Without the garbage collector, which would come to it after hundreds of others."""
    caplog.set_level(logging.CRITICAL)  # pytest keeps the records, and they the failures
    worker = EngineWorker(lambda: open_engine(server))
    worker.wait_loaded()
    server.habit = habit
    gc.disable()
    try:
        pictures = []
        for seed in range(2):  # the worker may keep the last one
            request = build_request(seed)
            pictures.append(weakref.ref(request.image))
            with pytest.raises(RemoteError):
                worker.generate(request)
        until(lambda: pictures[0]() is None)
    finally:
        gc.enable()
        worker.close()
