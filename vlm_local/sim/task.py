"""What a task is: where things lie at the start, in which words it is asked, when it is done."""

from itertools import product
from typing import ClassVar

import numpy as np

from vlm_local.sim.levels import Level
from vlm_local.sim.world import World


class Task:
    """One task. `sample` draws an episode into the world; the other methods judge it.

    kind: of scene. stages: what is to be achieved, in order. words: instructions, the first one
    AutoEval's or the plainest; unseen: words kept out of training; wrong_words: of the opposite task.
    `instruction` is of the episode, `wrong_instruction` asks for something else in the same scene;
    `names` is what filled the words' places, such as {"colour": "red"}. cue_steps: control steps at the beginning in
    which the arm waits and the pictures show a cue (sim/memory_tasks.py).
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    stages: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    unseen: ClassVar[tuple[str, ...]]
    wrong_words: ClassVar[str] = ""
    cue_steps: ClassVar[int] = 0
    instruction: str
    wrong_instruction: str
    names: dict[str, str]

    def sample(self, world: World, level: Level, rng: np.random.Generator) -> None:
        raise NotImplementedError

    def show_cue(self, world: World) -> None:
        """Change what a picture shows, for a task with `cue_steps`. The caller undoes it."""

    def is_done(self, world: World) -> bool:
        raise NotImplementedError

    def is_lost(self, world: World) -> bool:
        """Something happened after which success would not count."""
        return False

    def count_stages(self, world: World) -> int:
        """How many of `stages` hold now, counted from the first."""
        return len(self.stages) if self.is_done(world) else 0

    @classmethod
    def list_words(cls, level: Level) -> tuple[str, ...]:
        """The wordings of a level."""
        return {"first": cls.words[:1], "seen": cls.words, "unseen": cls.unseen}[level.wording]

    def phrase_instruction(self, level: Level, rng: np.random.Generator, names=None, wrong_names=None) -> None:
        """Draw the words; names, wrong_names: what fills them, and what would ask for something else."""
        choices = self.list_words(level)
        words = choices[rng.integers(len(choices))]
        self.names = names or {}
        self.instruction = words.format(**self.names)
        self.wrong_instruction = (self.wrong_words or words).format(**(wrong_names or {}))


def combine(*parts: tuple[str, ...]) -> tuple[str, ...]:
    """Every sentence of one choice from each part, the first of each first."""
    return tuple(" ".join(choice) for choice in product(*parts))


def sample_start(level: Level, rng: np.random.Generator) -> np.ndarray:
    """(3,) m: where the finger tips start."""
    return np.array([0.25, 0.0, 0.16]) + level.spread * rng.uniform(-1, 1, 3) * (0.03, 0.06, 0.03)
