import numpy as np
import pytest

from vlm_local.errors import DataError, GrammarError
from vlm_local.primitives import WINDOW, format_phrase, is_labelable, label_episode, list_phrases, parse_phrase
from vlm_local.types import Primitive


def test_all_729_phrases_print_and_parse():
    phrases = list_phrases()
    assert len(set(phrases)) == 729
    assert all(format_phrase(parse_phrase(phrase)) == phrase for phrase in phrases)
    assert sum(is_labelable(parse_phrase(phrase)) for phrase in phrases) == 513


@pytest.mark.parametrize(
    ("phrase", "signs"),
    [
        ("stop", (0, 0, 0, 0, 0, 0)),
        ("move forward left, tilt up, close gripper", (1, 1, 0, 1, 0, -1)),
        ("move backward right down", (-1, -1, -1, 0, 0, 0)),
        ("rotate counterclockwise, open gripper", (0, 0, 0, 0, 1, 1)),
        ("tilt down, rotate clockwise", (0, 0, 0, -1, -1, 0)),
    ],
)
def test_signs_of_a_phrase(phrase, signs):
    assert parse_phrase(phrase) == Primitive(*signs)
    assert format_phrase(Primitive(*signs)) == phrase


@pytest.mark.parametrize("phrase", ["", "Stop", "move", "move left forward", "move up,tilt up", "stop, tilt up", "go"])
def test_other_words_are_no_phrase(phrase):
    with pytest.raises(GrammarError, match="movement phrase"):
        parse_phrase(phrase)


def _states(*last_minus_first: float) -> np.ndarray:
    states = np.zeros((WINDOW, 7), np.float32)
    states[-1] = last_minus_first
    return states


@pytest.mark.parametrize(
    ("motion", "phrase"),
    [
        ((0.03, 0, 0, 0, 0, 0, 0), "stop"),  # strictly more than the threshold
        ((0.031, 0, 0, 0, 0, 0, 0), "move forward"),
        ((0.2, 0.04, 0, 0, 0, 0, 0), "move forward"),  # the L1 clip hides the smaller axis
        ((0.05, 0.04, 0, 0, 0, 0, 0), "move forward left"),
        ((0.2, 0.1, 0.1, 0, 0, 0, 0), "move forward"),
        ((0, 0, 0, -0.31, 0.31, 0, 0), "tilt down"),  # roll wins over pitch
        ((0, 0, 0, 0.29, 0.31, 0, 0), "tilt up"),
        ((0, 0, 0, 0, 0, -6.2, 0), "rotate clockwise"),  # yaw is not unwrapped
        ((0, 0, 0, 0, 0, 0, -0.5), "close gripper"),
        ((0.2, 0, 0, 0.4, 0, 0.29, 0.04), "move forward, tilt up, open gripper"),  # what is clipped, what divided
    ],
)
def test_labels_follow_every_quirk(motion, phrase):
    labels, full = label_episode(_states(*motion))
    assert format_phrase(labels[0]) == phrase
    assert full == [True, False, False, False]
    (mirrored, *_), _ = label_episode(-_states(*motion))
    assert mirrored == Primitive(*(-sign for sign in labels[0]))


def test_windows_at_the_end_are_shorter_and_the_last_step_repeats_the_label_before_it():
    states = np.zeros((6, 7))
    states[1:, 0], states[4:, 2] = 0.04, 0.04  # forward in the first transition, up in the last but one
    labels, full = label_episode(states)
    assert list(map(format_phrase, labels)) == ["move forward", *["move up"] * 3, "stop", "stop"]
    assert full == [True, True, True, False, False, False]


def test_an_episode_of_one_step_has_no_label():
    with pytest.raises(DataError, match="1 step"):
        label_episode(np.zeros((1, 7), np.float32))


def test_labelling_leaves_the_states_alone():
    states = _states(0.5, 0.5, 0, 1, 0, 0, 0)
    before = states.copy()
    label_episode(states)
    np.testing.assert_array_equal(states, before)
