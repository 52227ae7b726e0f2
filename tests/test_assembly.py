import argparse
import json
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest

from tests.tiny_models import tiny_checkpoint
from vlm_local.assembly import open_policies
from vlm_local.cli.options import add_policy_options, read_policy_options
from vlm_local.errors import ConfigError, GrammarError
from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy_options import PolicyOptions
from vlm_local.resolved_options import open_engine
from vlm_local.types import AXES, Observation

OBSERVATION = Observation(np.zeros((64, 64, 3), np.uint8), "lift the cup", np.array([0.3, 0, 0.1, 0, 0, 0, 1.0]))


def _open(**options):
    policies = open_policies(PolicyOptions(**options))
    try:
        return policies.build("robot")
    finally:
        policies.close()


def test_a_model_becomes_a_policy_that_says_what_it_is(folder):
    policies = open_policies(PolicyOptions(model=str(folder), history=2, posterior="off"))
    policy = policies.build("robot")
    decision = policy.act(OBSERVATION)
    policies.close()
    assert decision.phrase in load_phrase_grammar().sentences and decision.action.shape == (7,)
    metadata = policy.metadata
    assert json.loads(json.dumps(dict(metadata))) == metadata == policies.metadata
    assert metadata["trained"] is None and metadata["family"] == "qwen2-vl" and metadata["decoder"] == "trie"
    assert metadata["grammar"]["sentences"] == 729 and metadata["prompt"]["name"] == "chat"
    assert metadata["decide"] == "greedy" and metadata["history"] == 2 and metadata["steps"]["x_m"] == 0.0125
    assert len(metadata["checkpoint_sha256"]) == 64 and {"torch", "transformers", "vlm_local"} <= set(
        metadata["versions"]
    )


@pytest.mark.slow
def test_a_contrast_takes_out_what_a_model_says_to_a_blank_picture():
    """At alpha 1 and with such a picture nothing of its weights is left: models that differ say the same."""
    grey = Observation(np.full((64, 64, 3), 127, np.uint8), "lift the cup")
    blank, seen = [], []
    for seed in (0, 1):
        folder = str(tiny_checkpoint("qwen2-vl", seed))
        policies = open_policies(PolicyOptions(model=folder, contrast=1.0, posterior="exact"))
        policy = policies.build("robot")
        blank.append(policy.act(grey))
        seen.append(policy.act(replace(OBSERVATION, step=1)))
        policies.close()
        assert policy.metadata["contrast"] == 1.0
        assert blank[-1].timings_ms["blank"] > 10 * seen[-1].timings_ms["blank"]
    for axis in AXES:
        assert blank[0].marginals[axis] == pytest.approx(blank[1].marginals[axis], abs=1e-5)
    assert seen[0].marginals["tilt"] != pytest.approx(seen[1].marginals["tilt"], abs=1e-3)


def test_a_flag_counts_before_the_sidecar_and_the_sidecar_before_the_default(folder):
    (folder / "mine.txt").write_text("[before]\n$instruction\n[after]\nnow\n")
    sidecar = {"trained": True, "decide": "sample", "temperature": 0.5, "steps_per_phrase": 3, "prompt": "mine.txt"}
    (folder / "vlm_local.json").write_text(json.dumps(sidecar))
    told = _open(model=str(folder), temperature=2.0).metadata
    assert (told["decide"], told["temperature"], told["posterior"]) == ("sample", 2.0, "fast")
    assert (told["steps_per_phrase"], told["prompt"]["name"], told["trained"]) == (3, "mine", True)


def test_a_family_has_its_own_prompt():
    assert _open(model=str(tiny_checkpoint("paligemma"))).metadata["prompt"]["name"] == "paligemma"


@pytest.mark.parametrize("model", ["random", "stop", "move up, open gripper"])
def test_baselines_come_through_the_same_door(model):
    policies = open_policies(PolicyOptions(model=model))
    policy = policies.build("robot")
    said = {policy.act(replace(OBSERVATION, step=step)).phrase for step in range(5)}
    assert len(said) > 1 if model == "random" else said == {model}
    assert policy.metadata["model"] == model
    policies.close()


def test_a_phrase_is_held_for_the_steps_that_are_asked_for():
    policies = open_policies(PolicyOptions(model="random", steps_per_phrase=3))
    policy = policies.build("robot")
    said = [policy.act(replace(OBSERVATION, step=step)).phrase for step in range(9)]
    assert said[0] == said[1] == said[2] and len(set(said)) == 3
    policies.close()


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"model": "qwen9"}, ConfigError, "there is no model"),
        ({"model": "127.0.0.1:8000"}, ConfigError, "names no model: .*such as http://127.0.0.1:8000"),
        ({"model": "localhost:8000/"}, ConfigError, "such as http://"),
        ({"model": "http:/127.0.0.1:8000"}, ConfigError, "such as http://"),
        ({"model": __file__}, ConfigError, "is a file; expected the folder of a model"),
        ({"model": "qwen2-vl-7b", "offline": True}, ConfigError, "fetch qwen2-vl-7b"),
        ({"model": "tilt up", "grammar": "primitives_moves"}, ConfigError, "does not hold 'tilt up'"),
        ({"grammar": "yes_no"}, GrammarError, "no movement phrase"),
        ({"model": "random", "temperature": 0.0}, ConfigError, "temperature"),
        ({"model": "random", "history": -1}, ConfigError, "history"),
        ({"model": "random", "steps_per_phrase": 0}, ConfigError, "steps-per-phrase"),
        ({"model": "random", "max_batch": 0}, ConfigError, "max-batch"),
        ({"model": "random", "prompt": "poem"}, ConfigError, "the shipped prompts are"),
        ({"model": "random", "engine": "cloud"}, ConfigError, "--engine must be"),
        ({"engine": "openai", "model": "m"}, ConfigError, "--engine-url"),
        (
            {"engine": "openai", "model": "m", "engine_url": "http://a", "contrast": 0.5},
            ConfigError,
            "--contrast needs the probabilities",
        ),
        ({"model": "random", "contrast": 0.5}, ConfigError, "--contrast would change nothing"),
        ({"model": "stop", "history": 2, "prompt": "brief"}, ConfigError, "--prompt, --history would change nothing"),
        ({"history": 2, "prompt": "answer"}, ConfigError, r"the prompt 'answer' does not show \$history"),
        ({"model": "http://127.0.0.1:1", "contrast": 0.5}, ConfigError, "takes no --contrast"),
        ({"contrast": -1.0}, ConfigError, "contrast must be"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(options, error, reason, monkeypatch, tmp_path):
    monkeypatch.setattr("vlm_local.models.find_shipped", lambda name: _ship(tmp_path))
    with pytest.raises(error, match=reason):
        _open(**options)


def _ship(folder):
    if not (folder / "tiny").exists():
        shutil.copytree(tiny_checkpoint("qwen2-vl"), folder / "tiny")
    return folder


def test_an_engine_alone_is_loaded_at_once():
    engine = open_engine(PolicyOptions(model=str(tiny_checkpoint("qwen2-vl")), max_batch=3))
    assert engine.max_batch == 3 and engine.metadata["decoder"] == "trie"


def test_every_option_has_a_flag_and_no_flag_leaves_it_open():
    parser = argparse.ArgumentParser()
    add_policy_options(parser)
    assert read_policy_options(parser.parse_args([])) == PolicyOptions()
    words = "--model m --quantize 4bit --history 3 --decide sample --temperature 0.5 --offline --deadline-ms 50"
    options = read_policy_options(parser.parse_args(words.split()))
    assert (options.quantize, options.history, options.temperature, options.deadline_ms) == ("4bit", 3, 0.5, 50)
    flags = {action.dest for action in parser._actions}
    assert {field.name for field in fields(PolicyOptions)} <= flags


def test_slightly_is_said_shown_in_the_prompt_and_executed_small(monkeypatch):
    model, shown = str(tiny_checkpoint("qwen2-vl")), []
    for grammar in ("primitives_slightly", "primitives"):
        policies = open_policies(PolicyOptions(model=model, grammar=grammar, posterior="off", decide="sample"))
        generate = policies.worker.generate
        monkeypatch.setattr(
            policies.worker, "generate", lambda request, ask=generate: shown.append(request.prompt) or ask(request)
        )
        policy = policies.build("robot")
        decisions = [policy.act(replace(OBSERVATION, step=step)) for step in range(6)]
        policies.close()
        for decision in decisions:
            largest = np.abs(decision.action[:6]).max()
            assert largest <= (0.03 if decision.phrase.startswith("slightly") else 0.125)
        steps = policy.metadata["steps"]["slightly"]
        assert steps is None if grammar == "primitives" else steps["tilt_rad"] == 0.03
    assert ["slightly" in prompt.before for prompt in shown] == [True] * 6 + [False] * 6
    assert all("fingertips swing toward the base" in prompt.before for prompt in shown)
