"""Drawing what one training step learns from: pictures, questions about them, and negatives.

A negative is a question whose right answer is "stop": about a blank picture, a picture that is none of
this scene, a thing that is not there, or told not to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_local.sim.block_tasks import COLOURS
from vlm_local.sim.tasks import MEMORY_TASKS, find_task
from vlm_local.training.collect import Shard
from vlm_local.training.questions import NO_SLOT, SLOTS, Question
from vlm_local.training.wordings import word_absent, word_negation, word_task

# Which word is right is hard to tell near the thing: farther away, down to this share is learnt from.
_NEAR_M, _FAR_SHARE = 0.05, 0.3
_OWN = 0.6  # share of pictures asked about by what the scene was made for
_OTHER_WORDS = 0.75  # share of questions in words of wordings.py, not the simulator's
# Shares of negatives: of pictures, and of the questions about the others.
_BLANK, _STRANGE, _FOREIGN = 0.03, 0.03, 0.05
_NEGATED, _ABSENT = 0.05, 0.06
_STOP = "stop"
_NOWHERE = (float("nan"),) * 3


@dataclass(frozen=True, eq=False)
class Example:
    """frame: uint8 (P, P, 3). proprio: float32 (7,). asked: questions to answer.

    things: questions that name everything in the picture; none where it is not of the simulator.
    first: uint8 (P, P, 3), the episode's first picture, None where the prompt does not show it.
    """

    frame: np.ndarray
    proprio: np.ndarray
    asked: list[Question]
    things: list[Question]
    first: np.ndarray | None = None


def draw_example(shards: Sequence[Shard], num_asked: int, rng: np.random.Generator, show_first: float = 0.0) -> Example:
    """A picture with questions about it. show_first: share of those that are shown with the episode's first picture;
    where it is not 0, each that a memory task is asked about is.
    """
    while True:
        example = _draw(shards, num_asked, rng)
        aside = min(np.hypot(*question.offset_m[:2]) for question in example.asked)
        if rng.random() < max(_FAR_SHARE, _NEAR_M / max(aside, _NEAR_M)):
            break
    needs_first = any(question.task in MEMORY_TASKS for question in example.asked)
    if not show_first or not (needs_first or rng.random() < show_first):
        example = replace(example, first=None)
    kind = rng.random()
    if kind < _BLANK:
        return _refuse(replace(example, frame=_draw_blank(example.frame.shape, rng), things=[]), rng)
    if kind < _BLANK + _STRANGE:
        return _refuse(replace(example, frame=_make_strange(example.frame, rng), things=[]), rng)
    if kind < _BLANK + _STRANGE + _FOREIGN:
        return _refuse(_show_another(example, _draw(shards, num_asked, rng), rng), rng)
    colours = {SLOTS[question.slot] for question in example.things} & set(COLOURS)
    return replace(example, asked=[_reword(question, colours, rng) for question in example.asked])


def _draw(shards: Sequence[Shard], num_asked: int, rng: np.random.Generator) -> Example:
    shard = shards[int(rng.integers(len(shards)))]
    index = rng.integers(len(shard.frames))
    questions = shard.questions[int(index)]
    is_own = questions[0].task in MEMORY_TASKS or rng.random() < _OWN  # the others need no memory
    own = [0] if is_own else []
    order = own + [place for place in rng.permutation(len(questions)) if place not in own]
    asked = [questions[place] for place in order[:num_asked]]
    things = [question for question in questions if question.slot != NO_SLOT]
    return Example(shard.frames[index], shard.proprio[index], asked, things, shard.firsts[shard.episode[index]])


def _reword(question: Question, colours: set[str], rng: np.random.Generator) -> Question:
    """The question in other words, or in few cases one that asks for nothing that can be done."""
    kind = rng.random()
    if kind < _NEGATED:
        words = word_negation(question.task, question.names, rng)
    elif kind < _NEGATED + _ABSENT:
        words = word_absent(question.task, question.names, colours, rng)
    else:
        return replace(question, instruction=_word(question, rng))
    return replace(question, instruction=words, phrase=_STOP, offset_m=_NOWHERE)


def _word(question: Question, rng: np.random.Generator) -> str:
    return word_task(question.task, question.names, rng) if rng.random() < _OTHER_WORDS else question.instruction


def _refuse(example: Example, rng: np.random.Generator) -> Example:
    """The right answer to all its questions is "stop"."""
    asked = [
        replace(question, instruction=_word(question, rng), phrase=_STOP, offset_m=_NOWHERE)
        for question in example.asked
    ]
    return replace(example, asked=asked)


def _show_another(example: Example, other: Example, rng: np.random.Generator) -> Example:
    """The picture of another kind of scene; upside down where the other one is of the same kind."""
    if find_task(other.asked[0].task).kind == find_task(example.asked[0].task).kind:
        return replace(example, frame=example.frame[::-1].copy(), things=[])
    proprio = (example if rng.random() < 0.5 else other).proprio  # neither picture nor numbers tell alone
    things = other.things if proprio is other.proprio else []
    return replace(example, frame=other.frame, proprio=proprio, things=things)


def _draw_blank(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """One colour, black or white in half of the cases, in some with noise."""
    colour = rng.uniform(0, 255, 3) if rng.random() < 0.5 else np.repeat((0, 255, 128)[rng.integers(3)], 3)
    noise = rng.normal(0, rng.uniform(0, 20), shape) if rng.random() < 0.4 else 0
    return np.clip(np.broadcast_to(colour, shape) + noise, 0, 255).astype(np.uint8)


def _make_strange(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture of nothing: the frame's squares in another order, coarse noise, or boxes of any colour."""
    size, kind = len(frame), rng.integers(3)
    if kind == 0:
        cell = size // int(rng.choice((4, 8)))
        cells = frame.reshape(size // cell, cell, size // cell, cell, 3).swapaxes(1, 2).reshape(-1, cell, cell, 3)
        cells = cells[rng.permutation(len(cells))].reshape(size // cell, size // cell, cell, cell, 3)
        return cells.swapaxes(1, 2).reshape(frame.shape)
    if kind == 1:
        cell = int(rng.choice((1, 4, 16, 32)))
        noise = rng.integers(0, 256, (size // cell, size // cell, 3), np.uint8)
        return noise.repeat(cell, axis=0).repeat(cell, axis=1)
    picture = _draw_blank(frame.shape, rng)
    for _ in range(rng.integers(2, 9)):
        top, left = rng.integers(0, size - 8, 2)
        height, width = rng.integers(8, size, 2)
        picture[top : top + height, left : left + width] = rng.integers(0, 256, 3)
    return picture
