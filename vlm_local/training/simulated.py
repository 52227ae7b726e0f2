"""Trains the embedded checkpoint in rounds: while one round is learnt, the next one is collected.

A run folder holds everything: `student-N/` (the model folder after round N; the last ones), `shards/`
(the newest frames), the optimiser's state, the log and its curves. A killed run goes on from its
last finished round and gives the same weights as one that was not.
"""

import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_local.checkpoint import open_checkpoint
from vlm_local.engines.loading import load_model
from vlm_local.processes import open_pool
from vlm_local.sim.tasks import find_task
from vlm_local.training.batches import Batch, BatchBuilder, TrainableTiny
from vlm_local.training.collect import Shard, load_shard
from vlm_local.training.examples import Example, draw_example
from vlm_local.training.optimisation import Optimisation, Recipe, claim_folder, draw_curves
from vlm_local.training.questions import SLOTS
from vlm_local.training.rounds import RoundSpec, collect_round, measure_round
from vlm_local.training.tiny import IMAGE_PX, show_first_picture, write_tiny, write_weights
from vlm_local.training.wordings import UNKNOWN

_TINT_FACTOR, _TINT_SUMMAND = 0.15, 0.05
_FIRST_SLOT = SLOTS.index("red")  # what the warm rounds ask for
_RATE, _RATE_ON = 1e-3, 5e-4  # learning rate from untrained and from trained weights
_HIDE_PROPRIO = 0.1  # share of pictures whose prompt does not tell the measured state

_ONLY_MEASURED = ("num_rounds", "measure_every", "measure_episodes")

_MIXES = {
    0: {"reach": 1.0},
    16: {"reach": 0.5, "open_drawer": 0.25, "close_drawer": 0.25},
    48: {
        "reach": 0.05,
        "reach_relation": 0.36,
        "open_drawer": 0.05,
        "close_drawer": 0.05,
        "eggplant_in_basket": 0.08,
        "eggplant_in_sink": 0.10,
        "push": 0.15,
        "lift": 0.16,
    },
}


@dataclass(frozen=True)
class Course:
    """What is collected and how it is learnt.

    mixes: round -> task name -> share of the scenes, from that round on. levels: name -> share of the
    scenes; rollouts are of the first. frames, steps: of a round.
    pictures, asked: of a step: pictures, and questions about each. keep: rounds whose frames are
    drawn from. learner_from: first round in which the student acts in half of the scenes.
    warm_rounds: first ones that ask for red only where it is among the things, so that where things
    are is learnt before which one is meant. measure_every: rounds between rollouts. show_first: share of
    pictures that are shown with their episode's first one; not 0, all of memory tasks are.
    """

    num_rounds: int = 128
    mixes: Mapping[int, Mapping[str, float]] = field(default_factory=lambda: dict(_MIXES))
    levels: Mapping[str, float] = field(default_factory=lambda: {"normal": 0.6, "varied": 0.4})
    frames: int = 800
    steps: int = 250
    pictures: int = 24
    asked: int = 2
    keep: int = 16
    learner_from: int = 8
    warm_rounds: int = 2
    show_first: float = 0.0
    measure_every: int = 16
    measure_episodes: int = 8

    def mix(self, number: int) -> Mapping[str, float]:
        """Task name -> share of the scenes of a round."""
        return self.mixes[max(start for start in self.mixes if start <= number)]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the weights. How far it goes is the recipe's number of steps."""
        fields = asdict(self) | {"mixes": {str(start): dict(mix) for start, mix in self.mixes.items()}}
        fields["levels"] = dict(self.levels)
        return {name: value for name, value in fields.items() if name not in _ONLY_MEASURED}


_MEMORY_COURSE = Course(
    num_rounds=24,
    mixes={0: {"reach_shown": 0.42, "put_back": 0.42, "push": 0.08, "reach": 0.08}},
    levels={"normal": 1.0},
    frames=300,
    steps=150,
    asked=1,
    learner_from=2,
    warm_rounds=0,
    show_first=0.7,
)


class SimulatedTraining:
    """One run of a course from a seed and the weights of a model folder."""

    def __init__(self, start: Path | None, folder: Path, course: Course, recipe: Recipe, seed: int):
        """start: folder whose weights a new run begins with, None for untrained ones drawn from the seed.

        A run that is there goes on from its own weights. Raises ConfigError where its settings were others, and
        while another process trains there.
        """
        settings = {"start_sha256": start and open_checkpoint(start).sha256, "seed": seed, **recipe.settings}
        self._lock = claim_folder(folder, folder, {**settings, "course": course.settings})
        if start is None:
            start = folder / "untrained"
            write_tiny(start, seed)
        if course.show_first:
            start = show_first_picture(start, folder / "start")
        self._start, self._folder, self._course, self._seed = start, folder, course, seed
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        loaded = load_model(open_checkpoint(start), device="cpu", dtype="float32")
        self._batches = BatchBuilder(start, loaded)
        torch.manual_seed(seed)  # the auxiliary heads start at random
        unknown = self._batches.find_tokens(UNKNOWN)
        self._trainable = TrainableTiny(loaded.model.requires_grad_(True).train(), unknown)
        self._optimisation = Optimisation(self._trainable, recipe, folder)
        self._shards: deque[Shard] = deque(maxlen=course.keep)
        self._measured: deque[tuple[int, Future]] = deque()

    def run(self) -> Path:
        """Train to the end of the course; the folder of the last student."""
        with self._lock:
            return self._run()

    def _run(self) -> Path:
        course, optimisation = self._course, self._optimisation
        first = optimisation.step // course.steps
        if first:  # a kill may have come after the state was saved and before the student was whole
            self._write_student(first - 1)
        if first >= course.num_rounds:
            return self._student(course.num_rounds - 1)
        self._reload(first)
        with open_pool(1) as pool:
            upcoming = self._submit(pool, first)
            for number in range(first, course.num_rounds):
                self._shards.append(load_shard(upcoming.result()))
                if number + 1 < course.num_rounds:
                    upcoming = self._submit(pool, number + 1)
                optimisation.run((number + 1) * course.steps, self._compute)
                self._write_student(number)
                self._clean(number)
                if (number + 1) % course.measure_every == 0:
                    self._measure(pool, number)
                self._log_measured(wait=False)
                self._draw_curves()
            self._log_measured(wait=True)
        self._draw_curves()
        return self._student(course.num_rounds - 1)

    def _write_student(self, number: int) -> None:
        """Only the course's last one says that it is trained."""
        is_last = number == self._course.num_rounds - 1
        write_weights(self._start, self._trainable.model, self._student(number), trained=is_last)

    def _draw_curves(self) -> None:
        tasks = self._course.mix(self._course.num_rounds - 1)
        draw_curves(self._folder, ("answer", "auxiliary", "exact", *(f"success {task}" for task in tasks)))

    def _compute(self, step: int):
        return self._trainable(self._draw(step))

    def _measure(self, pool: ProcessPoolExecutor, number: int) -> None:
        """Play rollouts when the collector comes to it."""
        course, step = self._course, self._optimisation.step
        played = pool.submit(
            measure_round,
            self._student(number),
            tuple(course.mix(number)),
            next(iter(course.levels)),
            course.measure_episodes,
        )
        self._measured.append((step, played))

    def _log_measured(self, wait: bool) -> None:
        """Log the rollouts that were played, oldest first. Raises what playing them raised."""
        while self._measured and (wait or self._measured[0][1].done()):
            step, played = self._measured.popleft()
            self._optimisation.log({"step": step, **played.result()})

    def _submit(self, pool: ProcessPoolExecutor, number: int) -> Future:
        course = self._course
        student = self._student(number - 2) if number >= max(2, course.learner_from) else None
        spec = RoundSpec(number, course.mix(number), course.levels, course.frames, IMAGE_PX, self._seed, student)
        return pool.submit(collect_round, spec, self._shard(number))

    def _shard(self, number: int) -> Path:
        return self._folder / "shards" / f"{number:05d}.npz"

    def _student(self, number: int) -> Path:
        return self._folder / f"student-{number:05d}"

    def _reload(self, number: int) -> None:
        """The frames that a run before this one had in memory when it ended round `number`."""
        for past in range(max(0, number - self._course.keep + 1), number):
            self._shards.append(load_shard(self._shard(past)))

    def _clean(self, number: int) -> None:
        """Delete what round `number` and those after it do not need."""
        self._shard(number - self._course.keep).unlink(missing_ok=True)
        shutil.rmtree(self._student(number - 3), ignore_errors=True)

    def _draw(self, step: int) -> Batch:
        """The batch of a step: a function of seed, step and the frames at hand."""
        course = self._course
        rng = np.random.default_rng([self._seed, 1, step])
        warm = step < course.warm_rounds * course.steps
        drawn = []
        while len(drawn) < course.pictures:
            example = draw_example(self._shards, 1 if warm else course.asked, rng, course.show_first)
            if not (warm and _comes_later(example)):
                drawn.append(example)
        tint = rng.uniform(-1, 1, (len(drawn), 2, 3)) * np.array([[_TINT_FACTOR], [_TINT_SUMMAND]])
        tint[:, 0] += 1
        shown = rng.random(len(drawn)) >= _HIDE_PROPRIO
        return self._batches.build(drawn, shown, tint)


def _comes_later(example: Example) -> bool:
    """In the warm rounds: where red is among the things, only it is asked for."""
    is_red_there = any(question.slot == _FIRST_SLOT for question in example.things)
    return is_red_there and any(question.slot != _FIRST_SLOT for question in example.asked)


def train_tiny(folder: Path, seed: int, start: Path | None, num_rounds: int | None, task: str | None) -> Path:
    """The course of docs/training.md in a run folder; returns the last student's folder.

    start: folder of trained weights to begin with, at the course's last mix; None begins with none.
    num_rounds: None for the course's. task: the only task of all rounds; None takes the course's mixes.
    """
    course = Course()
    if start is not None:
        first = max(course.mixes)
        mixes = {0: course.mixes[first]}
        course = replace(course, num_rounds=course.num_rounds - first, mixes=mixes, learner_from=2, warm_rounds=0)
    if task is not None:
        course = replace(course, mixes={0: {find_task(task).name: 1.0}})
    return _train(folder, seed, start, course, num_rounds, _RATE if start is None else _RATE_ON)


def train_memory(folder: Path, seed: int, start: Path, num_rounds: int | None) -> Path:
    """The variant that also sees an episode's first picture, in the memory tasks and the others.

    start: folder of trained weights to begin with. Returns the last student's folder.
    """
    return _train(folder, seed, start, _MEMORY_COURSE, num_rounds, _RATE)


def _train(folder: Path, seed: int, start: Path | None, course: Course, num_rounds: int | None, rate: float) -> Path:
    torch.set_num_threads(1)  # two wait for each other more than they help at this size
    course = replace(course, num_rounds=num_rounds or course.num_rounds)
    # A processor that does not multiply in bfloat16 takes twice as long for a step as in float32.
    bfloat16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    num_steps = course.num_rounds * course.steps
    recipe = Recipe(num_steps, rate, decay=0.45, save_every=course.steps, bfloat16=bfloat16)
    return SimulatedTraining(start, folder, course, recipe, seed).run()
