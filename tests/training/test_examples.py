"""What a step of the tiny model's training draws: words that stay within bounds, negatives that say stop."""

import re

import numpy as np
import pytest

from vlm_local.sim.environment import SimEnv
from vlm_local.sim.tasks import TASKS
from vlm_local.training.collect import collect
from vlm_local.training.examples import draw_example
from vlm_local.training.wordings import UNKNOWN, word_absent, word_negation, word_task

PRESENT = {"red", "green", "blue"}
NEGATED = "do not go to the {colour} block, stay where you are"  # of the spatial study


def _list_names(task):
    env = SimEnv(task, image_size=None)
    env.reset(seed=0)
    return env.task.names


@pytest.fixture(scope="module")
def names():
    return {task: _list_names(task) for task in TASKS}


@pytest.fixture(scope="module")
def shard():
    return collect({"lift": 1.0, "open_drawer": 1.0, "eggplant_in_sink": 1.0}, {"normal": 1.0}, 60, 128, (0, 1), None)


def _find_words(text):
    return set(re.findall("[a-z]+", text.lower()))


def test_no_word_is_one_that_only_unseen_instructions_have(names):
    fills = "red green blue yellow purple left right of behind in front"
    seen = _find_words(fills).union(*(_find_words(text) for kind in TASKS.values() for text in kind.words))
    unseen = set().union(*(_find_words(text) for kind in TASKS.values() for text in kind.unseen)) - seen
    assert len(unseen) > 20
    rng, used = np.random.default_rng(0), set()
    for _ in range(1000):
        for task, names_of_task in names.items():
            used |= _find_words(word_task(task, names_of_task, rng))
            used |= _find_words(word_negation(task, names_of_task, rng))
            used |= _find_words(word_absent(task, names_of_task, PRESENT, rng))
    assert len(used) > 500  # made-up words among them
    assert not used & (unseen | {"stay", "where"})
    assert UNKNOWN.lower() in used and UNKNOWN.lower() not in seen
    assert NEGATED.format(colour="red") not in {word_negation("reach", {"colour": "red"}, rng) for _ in range(1000)}


@pytest.mark.parametrize("task", TASKS)
def test_what_a_sentence_is_about_stands_in_most_of_them(task, names):
    rng = np.random.default_rng(0)
    texts = [word_task(task, names[task], rng) for _ in range(400)]
    assert len(set(texts)) > 200
    if colour := names[task].get("colour"):
        assert np.mean([colour in _find_words(text) for text in texts]) > 0.95  # others have a letter wrong
        others = PRESENT - {colour}
        assert not any(others & _find_words(text) for text in texts)


def test_a_thing_that_is_not_there_is_not_named_as_one_that_is(names):
    rng = np.random.default_rng(0)
    texts = [word_absent("reach", names["reach"], PRESENT, rng) for _ in range(400)]
    assert not any(PRESENT & _find_words(text) for text in texts)


@pytest.mark.slow
def test_negatives_say_stop_and_mean_nothing_and_others_are_as_collected(shard):
    rng = np.random.default_rng(0)
    answers = {(q.task, *q.names.items(), q.phrase) for asked in shard.questions for q in asked}
    drawn = [draw_example([shard], 2, rng) for _ in range(600)]
    asked = [question for example in drawn for question in example.asked]
    negatives = [question for question in asked if np.isnan(question.offset_m).all()]
    assert 0.1 < len(negatives) / len(asked) < 0.35
    assert {question.phrase for question in negatives} == {"stop"}
    for question in asked:
        if np.isfinite(question.offset_m).all():
            assert (question.task, *question.names.items(), question.phrase) in answers
    strange = [example for example in drawn if not example.things]
    assert 10 < len(strange) < 120
    assert all(question in negatives for example in strange for question in example.asked)


@pytest.mark.slow
def test_a_seed_fixes_what_is_drawn(shard):
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [draw_example([shard], 2, rng) for _ in range(20)]

    for one, same in zip(draw(1), draw(1), strict=True):
        assert str(one.asked) == str(same.asked) and (one.frame == same.frame).all()
    assert str(draw(1)[0].asked) != str(draw(2)[0].asked)


def test_a_memory_task_is_always_shown_the_first_picture_of_its_episode():
    memory, other = (collect({task: 1.0}, {"normal": 1.0}, 10, 128, (0, 2), None) for task in ("reach_shown", "lift"))
    rng, shown = np.random.default_rng(0), []
    for _ in range(200):
        example = draw_example([memory, other], 1, rng, show_first=0.5)
        if example.asked[0].task == "reach_shown":
            assert any((example.first == first).all() for first in memory.firsts)
        else:
            shown.append(example.first is not None)
    assert 0.35 < np.mean(shown) < 0.65 and len(shown) < 150
    assert all(draw_example([memory], 1, rng).first is None for _ in range(10))
