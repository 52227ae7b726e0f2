"""What each stage of a checkup does: it calls the runner of that measure, with a size that fits the time."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Any

from vlm_local.bench.subject import Subject, free_memory, load_subject
from vlm_local.checkup.pictures import compare_decoders, time_steps
from vlm_local.checkup.scores import score_pictures, summarise_part
from vlm_local.data import Selection, open_data_set
from vlm_local.environments import OURS, find_suite
from vlm_local.lab.closed_loop.run import RolloutPlan, run_rollouts
from vlm_local.lab.offline.run import EvaluationPlan, evaluate
from vlm_local.lab.results import RowFile
from vlm_local.lab.sources import PolicySource, name_policy, open_source
from vlm_local.lab.spatial.run import run_study
from vlm_local.lab.spatial.scenes import CHANGES
from vlm_local.lab.spatial.sets import SceneSet
from vlm_local.policy_options import PolicyOptions

PICTURES = "pictures.jsonl"
_NUM_PICTURES, _NUM_TIMED = 100, 100
_SHARE = {"decoding": 0.2, "speed": 0.1, "spatial": 0.25, "eval": 0.15, "sim": 0.25}  # of the time
_SCENES, _LEVEL = 40, "normal"  # the first of docs/spatial/normal.json, or all
_EVERY, _MOST_STEPS = 5, 1000  # of recorded episodes: one a second at 5 Hz
_MOST_EPISODES = 5  # of a task
_DRAWING_S = 0.06  # of a picture, and of moving the arm
_EXACT = 4  # a view wants the exact probabilities of all phrases: so many steps, roughly
_MOST_WORKERS = 8

Result = Mapping[str, Any]


class Stages:
    """Loads the model when a stage first needs it."""

    def __init__(self, options: PolicyOptions, data: str | None, seconds: float, path: Path, results: Mapping):
        """seconds: for all stages. results: of the stages before, which sizes depend on; others fill it in."""
        self._options, self._data, self._seconds = options, data, seconds
        self._name = name_policy(options)
        self._path, self._results = path, results
        self._subject: Subject | None = None
        self._source: PolicySource | None = None

    def list_all(self) -> list[tuple[str, Callable[[], Result]]]:
        """(name, stage), in order."""
        stages = (self.loads, self.decoding, self.speed, self.spatial, self.eval, self.sim)
        return [(stage.__name__, stage) for stage in stages if self._data or stage != self.eval]

    def close(self) -> None:
        if self._source is not None:
            self._source.close()

    def loads(self) -> Result:
        start = perf_counter()
        subject = self._load_subject()
        load_s, bytes_ = perf_counter() - start, int(subject.loaded.model.get_memory_footprint())
        return {**subject.about, "load_s": round(load_s, 2), "memory_bytes": bytes_}

    def decoding(self) -> Result:
        with closing(RowFile(self._path / PICTURES)) as file:
            seconds = self._find_seconds("decoding")
            compare_decoders(self._load_subject(), _NUM_PICTURES, seconds, tuple(file.rows), file.add)
        with closing(RowFile(self._path / PICTURES)) as file:
            return score_pictures(file.rows)

    def speed(self) -> Result:
        return time_steps(self._load_subject(), _NUM_TIMED, self._find_seconds("speed"))

    def spatial(self) -> Result:
        views = len(CHANGES) + 1
        num = int(self._find_seconds("spatial") / views / (_EXACT * self._step_s + _DRAWING_S))
        scenes = SceneSet(_LEVEL, 0, min(_SCENES, max(2, num)))
        policy = self._open_source().build("spatial", tell_all=True)
        return summarise_part("spatial", run_study(self._name, policy, scenes, self._path / "spatial"))

    def eval(self) -> Result:
        data = str(self._data)

        def open_data(report):
            return open_data_set(data, Selection(), report).episodes

        num_steps = min(_MOST_STEPS, max(1, self._find_seconds("eval") / self._step_s))
        limit = _count_episodes(open_data(lambda problem: None), _EVERY * num_steps)
        plan = EvaluationPlan(self._name, data, every=_EVERY, limit=limit)

        def open_first(report):
            return takewhile(lambda episode: episode.index < limit, open_data(report))

        about = open_data_set(data, Selection(), lambda problem: None).about
        source = _Borrowed(self._open_source())
        return summarise_part("eval", evaluate(plan, self._path / "eval", open_first, lambda: source, about_data=about))

    def sim(self) -> Result:
        """Rounds of one episode more of each task, as long as the next is likely to end in time."""
        suite, seconds = find_suite(OURS), self._find_seconds("sim")
        workers = min(os.cpu_count() or 1, _MOST_WORKERS)
        episode_s = suite.max_steps * (self._step_s + _DRAWING_S) / workers
        tasks = suite.tasks[: max(1, int(seconds / episode_s))]
        plan = RolloutPlan(self._name, tasks, _LEVEL, 1, 0, suite.max_steps, 0.0, "none", films=0, gif=False)
        start = perf_counter()
        while True:
            begin = perf_counter()
            scores = run_rollouts(self._path / "sim", plan, self._open_source(), workers)
            end = perf_counter()
            if plan.episodes == _MOST_EPISODES or end - start + end - begin > seconds:
                return summarise_part("sim", scores)
            plan = replace(plan, episodes=plan.episodes + 1)

    @property
    def _step_s(self) -> float:
        """Of a step, as it was measured."""
        return self._results["speed"].get("ms", {"p50": 1e3})["p50"] / 1e3

    def _find_seconds(self, stage: str) -> float:
        """Of the time that is left when the model has been loaded twice."""
        load_s = self._results["loads"]["load_s"]
        return _SHARE[stage] * max(0.0, self._seconds - 2 * load_s)

    def _load_subject(self) -> Subject:
        if self._subject is None:
            self._subject = load_subject(self._options, None, None)
        return self._subject

    def _open_source(self) -> PolicySource:
        """The model as `sim` and the others ask it. The first one's memory is given back before."""
        if self._source is None:
            self._subject = None
            gc.collect()
            free_memory()
            self._source = open_source(self._options)
        return self._source


class _Borrowed(PolicySource):
    """A source that its owner goes on to use: closing this one leaves it open."""

    def __init__(self, source: PolicySource):
        self._source = source
        self.metadata, self.max_workers, self.sees = source.metadata, source.max_workers, source.sees

    def build(self, worker, tell_all=False, read_oracle=None):
        return self._source.build(worker, tell_all, read_oracle)


def _count_episodes(episodes: Iterator, num_steps: float) -> int:
    """How many of the first hold this many steps; at least one."""
    for episode in episodes:
        num_steps -= len(episode)
        if num_steps <= 0:
            return episode.index + 1
    return 1_000_000
