"""Against a real vLLM: every way it takes constraints, what it does to probabilities, how it dies."""

import functools
import time

import numpy as np
import pytest

import vlm_local.engines.remote
from tests.vllm.server import MODEL
from vlm_local.checkpoint import open_checkpoint
from vlm_local.engines.chat_api import Dialect
from vlm_local.engines.hf import open_hf_engine
from vlm_local.engines.openai import OpenAIEngine
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import ConfigError, EngineError
from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy import VLMPolicy
from vlm_local.prompts import build_prompt, load_template
from vlm_local.types import GenerationRequest, Observation

GRAMMAR = load_phrase_grammar()
TEMPLATE = load_template("chat")
NUM_PARITY = 100


@functools.cache
def draw_image(seed):
    """Coloured rectangles on a plain ground: pictures that differ as pictures do, 256x256."""
    random = np.random.default_rng(seed)
    image = np.empty((256, 256, 3), np.uint8)
    image[:] = random.integers(0, 256, 3)
    for _ in range(6):
        top, left = random.integers(0, 200, 2)
        height, width = random.integers(20, 120, 2)
        image[top : top + height, left : left + width] = random.integers(0, 256, 3)
    return image


def observe(seed):
    random = np.random.default_rng(seed)
    proprio = np.append(random.normal(0, 0.3, 6), random.random())
    return Observation(draw_image(seed), f"put the block into bowl {seed}", proprio)


def build_request(seed, robot="robot", **options):
    observation = observe(seed)
    prompt = build_prompt(TEMPLATE, observation)
    return GenerationRequest(observation.image, prompt, GRAMMAR.sentences, episode=f"{robot}/1", **options)


@pytest.fixture
def open_engine():
    engines = []

    def open_(*servers, **options):
        engines.append(OpenAIEngine([server.url for server in servers], MODEL, **options))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("dialect", ["vllm-choice", "vllm-regex", "vllm-grammar", "vllm-json", "json-schema"])
def test_vllm_keeps_to_the_grammar_in_each_of_its_dialects(vllm, open_engine, dialect):
    engine = open_engine(vllm, dialect=dialect)
    outcomes = engine.generate([build_request(seed) for seed in range(16)])
    assert not [outcome for outcome in outcomes if isinstance(outcome, EngineError)]
    assert len({outcome.sentence for outcome in outcomes}) > 1


def test_vllm_ignores_a_field_it_has_dropped_and_is_then_refused(vllm, monkeypatch):
    old = Dialect("guided-choice", lambda sentences: {"guided_choice": list(sentences)})
    monkeypatch.setattr(vlm_local.engines.remote, "DIALECTS", (old,))
    with pytest.raises(ConfigError, match="does not keep to a list"):
        OpenAIEngine([vllm.url], MODEL)


def test_500_draws_are_phrases_all(vllm, open_engine):
    engine = open_engine(vllm, deadline_ms=120_000, max_batch=8)
    uniforms = np.random.default_rng(0).random(500)
    said, questions = [], 0
    for first in range(0, 500, 8):
        requests = [
            build_request(seed, robot=f"robot-{seed % 8}", decide="sample", uniform=float(uniforms[seed]))
            for seed in range(first, min(first + 8, 500))
        ]
        for outcome in engine.generate(requests):
            assert not isinstance(outcome, EngineError), outcome
            said.append(outcome.sentence)
            questions += outcome.stats["questions"]
    assert set(said) <= set(GRAMMAR.sentences) and len(said) == 500
    print(f"{len(set(said))} phrases in 500 draws, {questions / 500:.2f} questions a draw")
    assert len(set(said)) > 10


def test_the_same_seed_draws_the_same_phrase_alone_and_in_a_batch(vllm, open_engine):
    engine = open_engine(vllm)
    requests = [build_request(seed, decide="sample", uniform=(seed + 0.5) / 16) for seed in range(16)]
    together = [outcome.sentence for outcome in engine.generate(requests)]
    alone = [engine.generate([request])[0].sentence for request in requests]
    assert together == alone


def test_probabilities_are_those_of_our_own_engine(vllm, open_engine, checkpoint):
    """Where the server's lower bounds settle a phrase they must agree with the exact posterior."""
    remote = open_engine(vllm)
    local = open_hf_engine(open_checkpoint(checkpoint), device="cpu", dtype="float32")
    for seed in range(5):
        (told,) = remote.generate([build_request(seed)])
        (exact,) = local.generate([build_request(seed, posterior="exact")])
        known = told.probabilities > 0.01
        assert known.any()
        assert told.probabilities[known] == pytest.approx(exact.probabilities[known], abs=0.01)


def test_vllm_says_what_our_own_engine_says(vllm, open_engine, checkpoint):
    """The same float32 checkpoint and prompts, greedy: different phrases need a near-tie behind them."""
    remote = open_engine(vllm)
    local = open_hf_engine(open_checkpoint(checkpoint), device="cpu", dtype="float32")
    different, phrases = [], set()
    for seed in range(NUM_PARITY):
        (ours,) = local.generate([build_request(seed)])
        (theirs,) = remote.generate([build_request(seed)])
        phrases.add(ours.sentence)
        if ours.sentence != theirs.sentence:
            (exact,) = local.generate([build_request(seed, posterior="exact")])
            first, second = (exact.probabilities[GRAMMAR.sentences.index(g.sentence)] for g in (ours, theirs))
            different.append((seed, ours.sentence, theirs.sentence, float(first), float(second)))
    print(f"{NUM_PARITY - len(different)} of {NUM_PARITY} the same, {len(phrases)} phrases; different: {different}")
    assert len(phrases) > 5
    assert all(abs(first - second) < 1e-3 for *_, first, second in different), different


def test_a_killed_server_faults_its_steps_and_serves_again_when_it_is_back(start_vllm):
    server = start_vllm()
    server.wait_ready()
    engine = OpenAIEngine([server.url], MODEL, deadline_ms=2000)
    worker = EngineWorker(lambda: engine, deadline_ms=4000, warm_up=[build_request(0)])
    worker.wait_loaded()
    policy = VLMPolicy(worker.generate, GRAMMAR, TEMPLATE)
    try:
        before = [policy.act(observe(seed)).phrase for seed in range(3)]
        server.kill()
        for seed in range(3, 6):
            start = time.perf_counter()
            with pytest.raises(EngineError, match="cannot be reached"):
                policy.act(observe(seed))
            assert time.perf_counter() - start < 2.5
        server.start()
        server.wait_ready()
        again = [_act_patiently(policy, seed) for seed in range(3)]
        assert again == before
        assert engine.metadata["counters"]["connection"] >= 3
    finally:
        worker.close()


def _act_patiently(policy, seed):
    """A server that has just started warms its kernels up behind the first question."""
    for _ in range(20):
        try:
            return policy.act(observe(seed)).phrase
        except EngineError:
            time.sleep(1)
    raise AssertionError("the server is back but answers nothing within its deadline")


def test_robots_of_a_dead_server_go_on_with_the_other_and_come_back(vllm, start_vllm, open_engine):
    mortal = start_vllm()
    mortal.wait_ready()
    engine = open_engine(mortal, vllm, deadline_ms=10_000)
    robots = ["a", "b", "c", "d"]

    def ask_all(seed):
        outcomes = engine.generate([build_request(seed, robot) for robot in robots])
        assert not [outcome for outcome in outcomes if isinstance(outcome, EngineError)], outcomes
        return [outcome.sentence for outcome in outcomes]

    before = ask_all(0)
    mortal.kill()
    assert ask_all(0) == before  # the step at which it is noticed, too
    assert [server["up"] for server in engine.metadata["servers"]] == [False, True]
    mortal.start()
    mortal.wait_ready()
    end = time.monotonic() + 60
    while not engine.metadata["servers"][0]["up"] and time.monotonic() < end:
        time.sleep(0.2)
    assert engine.metadata["counters"]["revived"] == 1
    assert ask_all(0) == before
