import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.serving import until
from vlm_local.engines import MAX_PIXELS, scale_down
from vlm_local.engines.scripted import ScriptedEngine
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import ConfigError, EngineClosed, EngineError, RequestError
from vlm_local.types import Generation, GenerationRequest, Prompt

SENTENCES = ("move up", "move down", "stop")


def _request(name: str = "a", episode: str | None = None) -> GenerationRequest:
    return GenerationRequest(np.zeros((16, 16, 3), np.uint8), Prompt("", name), SENTENCES, episode)


class GatedEngine(ScriptedEngine):
    """Every forward waits at a gate; says what it was given."""

    def __init__(self, max_batch: int = 4):
        super().__init__(lambda request: np.array([1, 0, 0]), "gated")
        self.max_batch = max_batch
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.batches: list[list[str]] = []
        self.forgotten: list[str] = []
        self.is_closed = False

    def close(self):
        self.is_closed = True

    def generate(self, requests):
        self.batches.append([request.prompt.after for request in requests])
        self.entered.release()
        self.gate.acquire()
        if any(request.prompt.after == "bad" for request in requests):
            raise RuntimeError("out of memory")
        return super().generate(requests)

    def forget(self, episode):
        self.forgotten.append(episode)


class Caller(threading.Thread):
    """generate() in a thread of its own; `outcome` is what it returned or raised."""

    def __init__(self, worker, request):
        super().__init__(daemon=True)
        self.worker, self.request, self.outcome = worker, request, None
        self.start()

    def run(self):
        try:
            self.outcome = self.worker.generate(self.request)
        except Exception as error:
            self.outcome = error

    def finish(self):
        self.join(60)
        assert not self.is_alive(), "the caller was never answered"
        return self.outcome


@pytest.fixture
def make_worker():
    made = []

    def make(engine, **options):
        worker = EngineWorker(engine if callable(engine) else lambda: engine, **options)
        made.append((worker, engine))
        return worker

    yield make
    for worker, engine in made:
        if isinstance(engine, GatedEngine):
            for _ in range(20):
                engine.gate.release()
        assert worker.close(60)


def test_a_lone_request_starts_at_once_and_those_that_wait_share_the_next_forward(make_worker):
    engine = GatedEngine(max_batch=3)
    worker = make_worker(engine)
    callers = [Caller(worker, _request("0"))]
    assert engine.entered.acquire(timeout=60)
    for index in range(1, 6):
        callers.append(Caller(worker, _request(str(index))))
        until(lambda index=index: worker.num_waiting == index)
    time.sleep(0.1)
    for _ in range(3):
        engine.gate.release()
    generations = [caller.finish() for caller in callers]
    assert [generation.sentence for generation in generations] == ["move up"] * 6
    assert engine.batches == [["0"], ["1", "2", "3"], ["4", "5"]]
    assert generations[5].timings_ms["queue"] > 100


def _queue(worker, engine, *requests):
    """Callers of requests that wait, in this order, while the first one's forward runs."""
    callers = [Caller(worker, requests[0])]
    assert engine.entered.acquire(timeout=60)
    for count, request in enumerate(requests[1:], 1):
        callers.append(Caller(worker, request))
        until(lambda count=count: worker.num_waiting == count)
    return callers


def test_robots_go_before_questions_and_share_no_forward_with_them(make_worker, monkeypatch):
    monkeypatch.setattr("vlm_local.engines.OTHERS_WAIT_S", 3600.0)
    engine = GatedEngine()
    worker = make_worker(engine)
    robots = [_request(name, episode=f"{name}/1") for name in ("left", "right")]
    callers = _queue(worker, engine, _request("running"), _request("first"), robots[0], _request("second"), robots[1])
    engine.gate.release(3)
    assert {caller.finish().sentence for caller in callers} == {"move up"}
    assert engine.batches == [["running"], ["left", "right"], ["first", "second"]]


def test_a_question_waits_for_robots_only_so_long(make_worker, monkeypatch):
    monkeypatch.setattr("vlm_local.engines.OTHERS_WAIT_S", 0.05)
    engine = GatedEngine()
    worker = make_worker(engine)
    robot = _request("robot", episode="robot/1")
    callers = _queue(worker, engine, _request("running"), _request("question"), robot)
    time.sleep(0.1)
    engine.gate.release(3)
    assert {caller.finish().sentence for caller in callers} == {"move up"}
    assert engine.batches == [["running"], ["question"], ["robot"]]


def test_a_large_picture_is_scaled_down_once(make_worker):
    seen = []
    worker = make_worker(lambda: ScriptedEngine(lambda request: seen.append(request.image) or np.ones(3), "seen"))
    large = np.random.default_rng(0).integers(0, 256, (2000, 700, 3), np.uint8)
    small = np.zeros((16, 16, 3), np.uint8)
    for image in (large, small):
        worker.generate(replace(_request(), image=image))
    assert seen[0].shape == (1693, 592, 3) and seen[0].size <= 3 * MAX_PIXELS and seen[1] is small
    assert scale_down(seen[0]) is seen[0]


@pytest.mark.parametrize("error", [RequestError("too thin a picture"), EngineError("an odd picture")])
def test_an_error_in_the_place_of_an_answer_is_its_callers_alone(make_worker, error):
    class Picky(GatedEngine):
        def generate(self, requests):
            answers = super().generate(requests)
            return [
                error if each.prompt.after == "thin" else answer for each, answer in zip(requests, answers, strict=True)
            ]

    engine = Picky()
    worker = make_worker(engine)
    first, *callers = _queue(worker, engine, *map(_request, ("first", "thin", "fine")))
    engine.gate.release(2)
    assert first.finish().sentence == "move up"
    thin, fine = (caller.finish() for caller in callers)
    assert type(thin) is type(error) and str(thin) == str(error) and fine.sentence == "move up"
    assert sorted(map(len, engine.batches)) == [1, 2] and worker.state == "healthy"


def test_a_request_that_fails_spoils_no_other_of_its_batch(make_worker):
    engine = GatedEngine()
    worker = make_worker(engine)
    first, *callers = _queue(worker, engine, *map(_request, ("first", "good", "bad")))
    for _ in range(4):
        engine.gate.release()
    outcomes = {caller.request.prompt.after: caller.finish() for caller in [first, *callers]}
    error = outcomes.pop("bad")
    assert isinstance(error, EngineError) and "out of memory" in str(error)
    assert {generation.sentence for generation in outcomes.values()} == {"move up"}
    assert worker.state == "healthy"


def test_past_the_deadline_it_is_stuck_until_the_forward_returns(make_worker):
    engine = GatedEngine()
    worker = make_worker(engine, deadline_ms=1000)
    late = Caller(worker, _request("late")).finish()
    assert isinstance(late, EngineError) and "deadline of 1 s" in str(late)
    until(lambda: worker.state == "stuck")
    with pytest.raises(EngineError, match="stuck"):
        worker.generate(_request("next"))
    engine.gate.release()
    until(lambda: worker.state == "healthy")
    engine.gate.release()
    assert worker.generate(_request("after")).sentence == "move up"
    assert engine.batches == [["late"], ["after"]]


def test_a_request_that_gave_up_waiting_never_reaches_the_engine(make_worker):
    engine = GatedEngine(max_batch=1)
    worker = make_worker(engine, deadline_ms=1000)
    first = Caller(worker, _request("first"))
    assert engine.entered.acquire(timeout=60)
    second = Caller(worker, _request("second"))
    until(lambda: worker.num_waiting == 1)
    assert isinstance(first.finish(), EngineError)
    assert isinstance(second.finish(), EngineError)
    engine.gate.release()
    until(lambda: worker.state == "healthy")
    assert engine.batches == [["first"]]


def test_an_answer_to_a_picture_that_is_too_old_is_none_though_it_is_there(make_worker, monkeypatch):
    """A process, or a whole virtual machine, that was paused: what waits for the answer stood still as well."""
    engine = GatedEngine()
    worker = make_worker(engine, deadline_ms=60_000)
    asked = Caller(worker, _request("a"))
    engine.entered.acquire()
    monkeypatch.setattr("vlm_local.engines.worker.perf_counter", lambda: time.perf_counter() + 61)
    engine.gate.release()
    assert "deadline of 60 s" in str(asked.finish())
    engine.gate.release()
    assert isinstance(Caller(worker, _request("b")).finish(), Generation)  # nothing is stuck


def test_a_batch_that_failed_past_the_deadline_is_not_tried_again(make_worker):
    engine = GatedEngine()
    worker = make_worker(engine, deadline_ms=1000)
    first, *callers = _queue(worker, engine, *map(_request, ("first", "good", "bad")))
    engine.gate.release()
    assert first.finish().sentence == "move up"
    assert all("deadline" in str(caller.finish()) for caller in callers)
    until(lambda: worker.state == "stuck")
    engine.gate.release()
    until(lambda: worker.state == "healthy")
    assert len(engine.batches) == 2


def test_it_loads_in_its_own_thread_and_warms_up_before_it_is_healthy(make_worker):
    engine, loading, loaded = GatedEngine(), threading.Event(), threading.Event()
    threads = []

    def load():
        threads.append(threading.current_thread().name)
        loading.set()
        loaded.wait(60)
        return engine

    worker = make_worker(load, warm_up=[_request("warm", "warm/0")])
    assert loading.wait(60) and worker.state == "loading" and worker.metadata == {}
    caller = Caller(worker, _request("early"))
    loaded.set()
    assert engine.entered.acquire(timeout=60) and worker.state == "loading"
    engine.gate.release(2)
    assert caller.finish().sentence == "move up"
    assert worker.state == "healthy" and worker.metadata["model"] == "gated"
    assert engine.batches == [["warm"], ["early"]] and threads == ["engine"] and engine.forgotten == ["warm/0"]


@pytest.mark.parametrize("error", [ConfigError("no such model"), RuntimeError("torn file")])
def test_a_load_that_fails_says_why(make_worker, error):
    def load():
        raise error

    worker = make_worker(load)
    with pytest.raises((ConfigError, EngineError), match=str(error)):
        worker.wait_loaded(5)
    assert worker.state == "failed"
    with pytest.raises((ConfigError, EngineError), match=str(error)):
        worker.generate(_request())


def test_a_warm_up_that_is_refused_is_a_load_that_failed(make_worker):
    class Picky(ScriptedEngine):
        def generate(self, requests):
            return [RequestError("too thin a picture")]

    worker = make_worker(Picky(lambda request: np.ones(3), "picky"), warm_up=[_request()])
    with pytest.raises(RequestError, match="too thin"):
        worker.wait_loaded(60)
    assert worker.state == "failed"


def test_a_sentence_that_was_not_asked_for_is_an_error(make_worker):
    class Liar(GatedEngine):
        def generate(self, requests):
            return [Generation("fly away")] * len(requests)

    with pytest.raises(EngineError, match="left the grammar and said 'fly away'"):
        make_worker(Liar()).generate(_request())


def test_episodes_are_forgotten_in_the_engine_thread(make_worker):
    engine = GatedEngine()
    worker = make_worker(engine)
    worker.forget("robot/1")
    until(lambda: engine.forgotten == ["robot/1"])


def test_close_answers_everyone_who_waits(make_worker):
    engine = GatedEngine(max_batch=1)
    worker = make_worker(engine)
    callers = [Caller(worker, _request(str(index))) for index in range(3)]
    until(lambda: worker.num_waiting == 2)
    assert not worker.close(0.05)  # the forward cannot be interrupted
    assert all(isinstance(caller.finish(), EngineClosed) for caller in callers)
    with pytest.raises(EngineClosed):
        worker.generate(_request())
    assert worker.state == "closed" and not engine.is_closed
    engine.gate.release()
    assert worker.close(60) and engine.is_closed


def test_close_waits_for_no_load(make_worker):
    loading, loaded = threading.Event(), threading.Event()

    def load():
        loading.set()
        loaded.wait(600)
        return GatedEngine()

    worker = make_worker(load)
    assert loading.wait(60)
    caller = Caller(worker, _request())
    assert not worker.close(0.05)
    assert isinstance(caller.finish(), EngineClosed)
    loaded.set()
