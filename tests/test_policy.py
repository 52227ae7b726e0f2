import numpy as np
import pytest

from vlm_local.engines.scripted import ScriptedEngine, build_constant_engine, build_uniform_engine
from vlm_local.errors import ConfigError
from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy import HoldPhrase, Settings, VLMPolicy, derive_seed, draw_uniform
from vlm_local.prompts import load_template
from vlm_local.types import Observation

GRAMMAR = load_phrase_grammar()


def _policy(engine, **settings) -> VLMPolicy:
    def generate(request):
        return engine.generate([request])[0]

    return VLMPolicy(generate, GRAMMAR, load_template("chat"), Settings(**settings))


def _observation(opening: float | None = None, step: int = 0, gripper: float | None = None) -> Observation:
    proprio = None if opening is None else np.array([0.3, 0, 0.1, 0, 0, 0, opening])
    return Observation(np.zeros((64, 64, 3), np.uint8), "lift the cup", proprio, step, gripper)


def test_a_phrase_becomes_an_action_and_the_gripper_is_latched():
    policy = _policy(build_constant_engine("move up, close gripper"))
    decision = policy.act(_observation(1.0))
    assert decision.phrase == "move up, close gripper"
    np.testing.assert_allclose(decision.action, [0, 0, 0.0125, 0, 0, 0, 0])
    assert (decision.probability, decision.margin, decision.missing_mass) == (1.0, 1.0, 0.0)
    assert decision.marginals["z"] == (0.0, 0.0, 1.0)


def test_marginals_sum_to_one_and_follow_the_signs():
    decision = _policy(build_uniform_engine(), decide="sample").act(_observation())
    for marginal in decision.marginals.values():
        np.testing.assert_allclose(marginal, [1 / 3] * 3)


def test_the_same_seed_gives_the_same_phrases_and_another_seed_others():
    def play(seed):
        policy.reset(seed)
        return [policy.act(_observation(step=step)).phrase for step in range(20)]

    policy = _policy(build_uniform_engine(), decide="sample")
    assert play(7) == play(7) != play(8)


def test_the_draw_of_a_step_does_not_hang_on_which_steps_were_asked():
    policy = _policy(build_uniform_engine(), decide="sample")
    policy.reset(7)
    every = [policy.act(_observation(step=step)).phrase for step in range(9)]
    policy.reset(7)
    assert [policy.act(_observation(step=step)).phrase for step in (2, 5, 8)] == every[2::3]


def test_the_gripper_is_under_the_command_that_the_caller_says():
    policy = _policy(build_constant_engine("move up"))
    told = [policy.act(_observation(step=step, gripper=command)).action[6] for step, command in enumerate((0, 1, 0))]
    assert told == [0, 1, 0]
    assert policy.act(_observation(step=3)).action[6] == 0


def test_draws_are_philox_of_seed_and_step():
    expected = np.random.Generator(np.random.Philox(key=[5, 3])).random()
    assert draw_uniform(5, 3) == expected
    assert draw_uniform(2**64 - 1, 0) != draw_uniform(0, 0)
    assert len({derive_seed(s, r, e) for s in (0, 1) for r in ("a", "b") for e in (0, 1)}) == 8


def test_history_reaches_the_prompt_and_ends_with_the_episode():
    prompts = []

    def weigh(request):
        prompts.append(request.prompt.after)
        return np.array([s == "move up" for s in request.sentences])

    policy = _policy(ScriptedEngine(weigh, "spy"), history=2)
    for _ in range(3):
        policy.act(_observation())
    policy.reset(0)
    policy.act(_observation())
    assert [prompt.count("move up") for prompt in prompts] == [0, 1, 2, 0]


def test_a_phrase_is_held_for_its_steps_and_no_longer_than_the_episode():
    asked = []

    def weigh(request):
        asked.append(request)
        return np.ones(len(request.sentences))

    policy = HoldPhrase(_policy(ScriptedEngine(weigh, "spy"), decide="sample"), steps=3)
    policy.reset(1)
    phrases = [policy.act(_observation(step=step)).phrase for step in range(7)]
    assert len(asked) == 3
    assert phrases[0] == phrases[1] == phrases[2]
    policy.reset(2)
    policy.act(_observation())
    assert len(asked) == 4
    policy.act(_observation(step=2))  # something else answered step 1: what was said before it is over
    assert len(asked) == 5


@pytest.mark.parametrize(
    "settings",
    [
        {"decide": "best"},
        {"posterior": "all"},
        {"temperature": 0},
        {"temperature": 10**400},
        {"contrast": 10**400},
        {"history": -1},
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        Settings(**settings)
