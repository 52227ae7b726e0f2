"""Episodes of the oracle under a setting: shared random numbers, vocabularies, errors that no episode survives."""

import pytest

from vlm_local.grammar import load_phrase_grammar
from vlm_local.lab.ceiling.error_models import AxisErrors, draw_uniforms
from vlm_local.lab.ceiling.play import build_projection, play_episode, play_settings
from vlm_local.lab.ceiling.settings import MISSED, OPPOSITE, PLAIN, Setting, build_error, list_curves, list_settings
from vlm_local.primitives import format_phrase, parse_phrase
from vlm_local.sim.environment import SimEnv
from vlm_local.types import Primitive


def test_the_same_chance_for_every_rate_and_axis():
    signs = Primitive(1, -1, 1, 1, -1, -1)
    steps = range(200)
    rare, often = (AxisErrors(build_error("x", OPPOSITE, rate), 7, 200) for rate in (0.05, 0.4))
    wrong = [{step for step in steps if errors.alter(signs, step, None) != signs} for errors in (rare, often)]
    assert wrong[0] < wrong[1] and 60 < len(wrong[1]) < 100
    of_all = AxisErrors(build_error("all", MISSED, 0.4), 7, 200)
    assert {step for step in steps if of_all.alter(signs, step, None).x == 0} == wrong[1]
    assert (draw_uniforms(7, 200)[:70] == draw_uniforms(7, 70)).all()


def test_an_axis_error_is_missed_or_opposite_and_only_where_the_axis_moves():
    moving = Primitive(x=1, y=-1)
    assert AxisErrors(build_error("y", OPPOSITE, 1.0), 0, 1).alter(moving, 0, None) == Primitive(x=1, y=1)
    assert AxisErrors(build_error("y", MISSED, 1.0), 0, 1).alter(moving, 0, None) == Primitive(x=1)
    assert AxisErrors(build_error("all", OPPOSITE, 1.0), 0, 1).alter(moving, 0, None) == Primitive(x=-1, y=1)
    assert AxisErrors(build_error("gripper", OPPOSITE, 1.0), 0, 1).alter(moving, 0, None) == moving


@pytest.mark.parametrize(
    ("grammar", "wanted", "said"),
    [
        ("primitives_labelable", "move forward left down, close gripper", "move forward left, close gripper"),
        ("primitives_labelable", "move left down, tilt up", "move left down, tilt up"),
        ("primitives_moves", "move forward left down, tilt up, close gripper", "move forward left down"),
        ("primitives_moves", "rotate clockwise", "stop"),
    ],
)
def test_what_a_smaller_vocabulary_says_instead(grammar, wanted, said):
    assert format_phrase(build_projection(grammar)[parse_phrase(wanted)]) == said


@pytest.mark.parametrize("grammar", ["primitives", "primitives_labelable", "primitives_moves"])
def test_a_projection_says_only_what_it_can_and_what_is_wanted(grammar):
    sentences = set(load_phrase_grammar(grammar).sentences)
    projection = build_projection(grammar)
    assert len(projection) == 729 and set(map(format_phrase, projection.values())) == sentences
    for wanted, said in projection.items():
        assert all(sign in (0, right) for sign, right in zip(said, wanted, strict=True))


@pytest.mark.slow
def test_always_the_opposite_never_succeeds():
    for seed in (0, 1, 2):
        plain, lost = play_settings("reach", "normal", seed, (PLAIN, build_error("x", OPPOSITE, 1.0)))
        assert plain and lost is None


def test_an_episode_without_an_error_need_not_be_played_again():
    settings = [build_error("x", MISSED, rate) for rate in (0.01, 0.05, 0.2)]
    env = SimEnv("open_drawer", image_size=None)
    played = [play_episode(env, 1, setting, AxisErrors(setting, 1, 120), 120)[0] for setting in settings]
    assert play_settings("open_drawer", "normal", 1, settings) == played
    assert len(set(played)) > 1


def test_settings_reach_the_arm():
    """Smaller steps and late answers take longer; a held phrase and larger steps change the way."""
    settings = (PLAIN, Setting(scale=0.5), Setting(latency=2), Setting(scale=2.0), Setting(hold=3))
    plain, small, late, large, held = play_settings("close_drawer", "easy", 0, settings)
    assert small > 1.5 * plain and late >= plain + 2 and large < plain and held != plain


def test_every_setting_of_the_curves_is_played_once():
    settings = list_settings(list_curves())
    assert settings[0] == PLAIN and len(settings) == len(set(settings)) == 95
