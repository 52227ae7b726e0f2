"""When the pieces of a thought are done: between steps, never where a robot waits or is expected."""

import time
from contextlib import closing
from functools import partial

import numpy as np
import pytest

from tests.serving import until
from tests.tiny_models import tiny_checkpoint
from vlm_local.engines.process import EngineProcess
from vlm_local.engines.scripted import build_uniform_engine
from vlm_local.engines.thoughts import ThoughtJob, ThoughtQueue
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import EngineError
from vlm_local.policy_options import PolicyOptions
from vlm_local.resolved_options import open_engine
from vlm_local.types import GenerationRequest, Prompt, Thought, ThoughtRequest

CHOICES = ("move up", "move down", "stop")
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
OPTIONS = PolicyOptions(model=str(tiny_checkpoint("smolvlm2")), device="cpu", dtype="float32")


def build_step(thought: Thought = Thought("", 0), robot: str = "robot") -> GenerationRequest:
    earlier = (thought.text,) if thought.text else ()
    return GenerationRequest(IMAGE, Prompt("Rules.", "Which?", earlier), CHOICES, episode=f"{robot}/1")


def build_thought(max_tokens: int = 60, robot: str = "robot", **options) -> ThoughtRequest:
    fields = (("TASK", 30), ("PLAN", 30))
    return ThoughtRequest(IMAGE, Prompt("Rules.", "Why?"), f"{robot}/1", fields, max_tokens, **options)


class Listening:
    """A real engine, and in `calls` what it was asked: "step", or the name of the piece that came next."""

    def __init__(self):
        self._engine = open_engine(OPTIONS)
        self.max_batch, self.metadata = self._engine.max_batch, self._engine.metadata
        self.calls: list[str] = []

    def generate(self, requests):
        self.calls.append("step")
        return self._engine.generate(requests)

    def think(self, episode, request=None):
        piece = self._engine.think(episode, request)
        self.calls.append(piece if isinstance(piece, str) else "done")
        return piece

    def forget(self, episode):
        self._engine.forget(episode)

    def close(self):
        """Nothing is open."""


@pytest.fixture(scope="module")
def listening():
    return Listening()


@pytest.fixture
def worker(listening):
    listening.calls.clear()
    worker = EngineWorker(lambda: listening)
    yield worker
    assert worker.close(60)


def test_a_step_that_comes_is_answered_before_the_thought_goes_on(worker, listening):
    future = worker.think(build_thought(), build_step)
    until(lambda: "write" in listening.calls)
    answer = worker.generate(build_step())
    assert answer.sentence in CHOICES and not future.done()
    at = listening.calls.index("step")
    time.sleep(0.2)
    assert listening.calls[at:] == ["step"]  # the robot may ask again at any moment
    thought = future.result(60)  # a second later it counts as gone
    assert thought.text.startswith("TASK: ") and 0 < thought.num_tokens <= 60 and thought.ms > 0
    assert listening.calls.count("look") == 1 and listening.calls[-1] == "done"  # it went on, and did not begin again
    assert worker.generate(build_step(thought)).stats["reused_tokens"] > answer.stats["reused_tokens"]


def test_a_thought_that_someone_waits_for_looks_for_no_pause(worker):
    worker.generate(build_step())
    assert worker.think(build_thought(4, is_awaited=True), build_step).result(60).num_tokens <= 4


def test_forgetting_an_episode_ends_its_thought(worker, listening):
    future, other = (worker.think(build_thought(robot=robot), build_step) for robot in ("robot", "other"))
    until(lambda: "write" in listening.calls)
    worker.forget("robot/1")
    assert future.cancelled() and other.result(60).text
    with pytest.raises(EngineError, match="nothing is being written for robot/1"):
        listening.think("robot/1")


@pytest.mark.long
def test_an_engine_in_its_own_process_writes_the_same(listening):
    def write(engine):
        outcome = engine.think("robot/1", build_thought(12))
        while isinstance(outcome, str):
            outcome = engine.think("robot/1")
        return outcome

    apart = EngineProcess(partial(open_engine, OPTIONS))
    try:
        assert write(apart) == write(listening)
        with pytest.raises(EngineError, match="nothing is being written"):
            apart.think("robot/1")
    finally:
        apart.close()


class Clock:
    """Seconds that a test sets, and an engine whose pieces take the time that it names."""

    max_batch, metadata = 1, {}

    def __init__(self, monkeypatch, piece_s: float):
        self.now, self._piece_s = 100.0, piece_s
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(f"vlm_local.engines.thoughts.{name}", lambda: self.now)

    def think(self, episode, request=None):
        self.now += self._piece_s
        return "begin"  # always the same kind, so that its time is known at the second

    def take_steps(self, queue, num: int, pause_s: float):
        for _ in range(num):
            queue.note_asked(build_step())
            self.now += 0.05
            queue.note_answered(build_step())
            self.now += pause_s
        self.now -= pause_s


def test_a_piece_is_begun_only_where_it_ends_before_the_next_step_is_expected(monkeypatch):
    queue = ThoughtQueue(clock := Clock(monkeypatch, piece_s=0.03))
    job = ThoughtJob(build_thought(), build_step)
    queue.add(job)
    queue.work(job)
    clock.take_steps(queue, 4, pause_s=0.2)
    answered = clock.now
    while (found := queue.pick(clock.now)) is not None:
        queue.work(found)
    assert 0.1 < clock.now - answered < 0.2  # as many as fit, then none
    clock.now = answered + 0.7
    assert queue.pick(clock.now) is None  # it is late, and may come at any moment
    clock.now = answered + 1.3
    assert queue.pick(clock.now) is job  # it has gone
    queue.note_asked(build_step())
    assert queue.pick(clock.now) is None


def test_robots_that_leave_no_pause_leave_no_thought(monkeypatch):
    queue = ThoughtQueue(clock := Clock(monkeypatch, piece_s=0.03))
    job = ThoughtJob(build_thought(), build_step)
    queue.add(job)
    queue.work(job)
    clock.take_steps(queue, 4, pause_s=0.02)
    assert queue.pick(clock.now) is None


def test_a_piece_that_was_slow_once_does_not_end_all_thinking(monkeypatch):
    queue = ThoughtQueue(clock := Clock(monkeypatch, piece_s=0.03))
    job = ThoughtJob(build_thought(), build_step)
    queue.add(job)
    for clock._piece_s in (0.03, 3.0, 0.03):
        queue.work(job)
    clock.take_steps(queue, 4, pause_s=0.2)
    assert queue.pick(clock.now) is job


def test_an_engine_that_writes_no_free_text_says_so():
    worker = EngineWorker(build_uniform_engine)
    with closing(worker), pytest.raises(EngineError, match="writes no free text"):
        worker.think(build_thought(), build_step).result(5)
