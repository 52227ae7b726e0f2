"""Episodes of a policy in parallel environments: into a result folder, then scores and a report.

RUN/meta.json holds the plan and what the policy says of itself; RUN/episodes/<task>-<n> the n-th episode, seeded with
plan.seed + n, for the environment and, across /reset, for the policy. An episode counts once its meta.json has an
`outcome`; the same command plays all others again, and those that faulted.
"""

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_local.data.film import write_film, write_gif
from vlm_local.data.runs import RunWriter
from vlm_local.environments import OURS, find_suite, name_episode, name_robot
from vlm_local.errors import ConfigError, EngineError, RequestError
from vlm_local.lab.closed_loop.controls import CONTROLS, RandomPhrases, apply_control
from vlm_local.lab.closed_loop.environment import State
from vlm_local.lab.closed_loop.process import EnvironmentProcess, borrow_environment
from vlm_local.lab.closed_loop.report import write_report
from vlm_local.lab.closed_loop.scores import score_run
from vlm_local.lab.results import ResultFolder
from vlm_local.lab.sources import PolicySource
from vlm_local.policy import Policy
from vlm_local.provenance import choose_deciding, describe_machine
from vlm_local.types import Decision
from vlm_local.wire import build_details

IMAGE_SIZE = 256
_FLOOR_EPISODES = 20  # of each task are also played by random phrases, which take long to fail
_END_FRAMES = 5  # how long a film shows what came of it

Progress = Callable[[Mapping[str, Any], int, int], None]


@dataclass(frozen=True)
class RolloutPlan:
    """What is played. films: episodes of each task of which frames and film are kept; gif: also as GIF.

    env: the suite that the tasks are of. noise: share of phrases replaced by random ones. control: as
    `--control` takes it.
    """

    policy: str
    tasks: tuple[str, ...]
    level: str
    episodes: int
    seed: int
    max_steps: int
    noise: float
    control: str
    films: int
    gif: bool
    env: str = OURS

    def __post_init__(self):
        find_suite(self.env).check(self.tasks, self.level, self.max_steps)
        if self.control not in CONTROLS or not 0 <= self.noise <= 1:
            raise ConfigError(f"there is no control {self.control!r} with noise {self.noise!r}")
        # An episode that counted twice would narrow the intervals.
        if not 0 < len(set(self.tasks)) == len(self.tasks) or self.episodes < 1:
            raise ConfigError(f"a run has episodes of one task or more, each once; not {self.episodes} of {self.tasks}")

    def list_episodes(self) -> list[tuple[str, int]]:
        """(task, number) of every episode."""
        return [(task, number) for task in self.tasks for number in range(self.episodes)]


_MAY_GROW = ("tasks", "episodes", "films", "gif")  # what may differ when a run is continued


def run_rollouts(
    path: Path, plan: RolloutPlan, source: PolicySource, workers: int, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Play what is missing in the folder, score it and write its report; returns the scores.

    progress: is given each episode's outcome, how many have ended and how many there are. Raises ConfigError where
    the folder holds another result.
    """
    with ResultFolder(path, "sim", "meta.json") as folder:
        places = {episode: path / "episodes" / name_episode(*episode) for episode in plan.list_episodes()}
        left = _begin(folder, plan, source, places)
        done = len(places) - len(left)

        def count(ended: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            progress(ended, done, len(places))

        _play(path, plan, source, left, int(min(workers, source.max_workers, len(left))), count)
        episodes = [outcome for outcome in map(read_outcome, places.values()) if outcome]
        scores = score_run(episodes, find_suite(plan.env).stages_of(plan.tasks))
        write_report(path, scores, episodes)
        return scores


def _begin(folder: ResultFolder, plan: RolloutPlan, source: PolicySource, places) -> list[tuple[str, int]]:
    """The (task, number) still to be played; what is left of them is removed."""
    episodes = folder.path / "episodes"
    has_results = episodes.is_dir() and any(map(_has_counted, episodes.iterdir()))
    here = {"simulator": asdict(plan), **source.metadata, **describe_machine()}
    folder.begin(here, _list_settings, has_results, grows=("simulator",))
    if not has_results:
        shutil.rmtree(episodes, ignore_errors=True)
    left = [episode for episode, place in places.items() if not _has_counted(place)]
    for episode in left:
        shutil.rmtree(places[episode], ignore_errors=True)
    return left


def _list_settings(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all parts of a run."""
    plan = {name: value for name, value in meta["simulator"].items() if name not in _MAY_GROW}
    return {"env": OURS, **plan, **choose_deciding(meta)}


def _has_counted(episode: Path) -> bool:
    outcome = read_outcome(episode)
    return outcome is not None and outcome["outcome"] != "faulted"


def read_outcome(episode: Path) -> dict[str, Any] | None:
    """meta.json of an episode that was played to its end, else None."""
    try:
        meta = json.loads((episode / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if "outcome" in meta else None


def _play(
    folder: Path, plan: RolloutPlan, source: PolicySource, left: list[tuple[str, int]], workers: int, count: Callable
) -> None:
    """Play what is left; `count` is given the outcome of every episode."""
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    for job in left:
        jobs.put(job)
    done: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()
    robots = [_Robot(folder, plan, source, worker, jobs, done, stop) for worker in range(workers)]
    try:
        for robot in robots:
            robot.start()
        for _ in left:
            ended = done.get()
            if isinstance(ended, BaseException):
                raise ended
            count(ended)
    finally:
        stop.set()
        for robot in robots:
            robot.join()


class _Stopped(Exception):
    """The run ends before the episode: it is played again when the run goes on."""


class _Robot(threading.Thread):
    """One robot: an environment process, a policy, and the files of one episode after another."""

    def __init__(self, folder: Path, plan: RolloutPlan, source: PolicySource, worker: int, jobs, done, stop):
        super().__init__(name=f"sim{worker}", daemon=True)
        self._folder, self._plan, self._source, self._worker = folder, plan, source, worker
        self._jobs, self._done, self._stop_asked = jobs, done, stop

    def run(self) -> None:
        try:
            with borrow_environment(self._plan.env, self._plan.level, IMAGE_SIZE) as environment:
                self._play_jobs(environment)
        except BaseException as error:  # of the environment, the disk or the program: the run ends with it
            self._done.put(error)

    def _play_jobs(self, environment: EnvironmentProcess) -> None:
        policy = self._source.build(f"sim{self._worker}", read_oracle=lambda: self._state.oracle)
        if self._plan.noise:
            policy = RandomPhrases(policy, self._plan.noise)
        with suppress(queue.Empty, _Stopped):
            while not self._stop_asked.is_set():
                task, number = self._jobs.get_nowait()
                self._done.put(self._play(environment, policy, task, number))

    def _play(self, environment: EnvironmentProcess, policy: Policy, task: str, number: int) -> dict[str, Any]:
        seed = self._plan.seed + number
        bounds = {"oracle_steps": environment.count_steps("oracle", task, seed, self._plan.max_steps)}
        if number < _FLOOR_EPISODES:
            bounds["random_steps"] = environment.count_steps("random", task, seed, self._plan.max_steps)
        writer = RunWriter(self._folder)
        keeps = number < self._plan.films
        episode = writer.start_episode(
            name_robot(task), {"task": task, "level": self._plan.level, "seed": seed}, number
        )
        model = self._source.metadata.get("model") or self._plan.policy
        film: list = []
        agreed = 0

        def record(state: State, decision: Decision, step: int) -> None:
            nonlocal agreed
            agreed += decision.phrase == state.oracle
            line = _build_line(state, decision, model, task, number, step)
            writer.add_step(line, state.observation.image if keeps else None)
            if keeps:
                film.append((state.observation.image, line))

        self._state = environment.reset(task, seed, drawn=keeps or self._source.sees)
        outcome = self._run_episode(environment, policy, seed, record)
        if film:
            still = [0.0] * 6 + film[-1][1]["action"][6:]  # the gripper stays as it was told
            end = {name: outcome[name] for name in ("instruction", "outcome")}
            end |= {"step": outcome["steps"], "action": still}
            film += [(self._state.observation.image, end)] * _END_FRAMES
            write_film(episode / "film.mp4", film)
            if self._plan.gif:
                write_gif(episode / "film.gif", film)
        ended = {"task": task, "number": number, "seed": seed, **bounds, **outcome, "agreed": agreed}
        writer.end_episode(name_robot(task), ended)
        return ended

    def _run_episode(self, environment: EnvironmentProcess, policy: Policy, seed: int, record) -> dict[str, Any]:
        """outcome: "success", "lost" (the chance is gone), "late" (max_steps) or "faulted"."""
        fault, outcome, steps = None, "late", 0
        instruction = self._state.observation.instruction
        try:
            policy.reset(seed)
            for step in range(self._plan.max_steps):
                if self._stop_asked.is_set():
                    raise _Stopped
                decision = policy.act(apply_control(self._plan.control, self._state))
                fault = fault or decision.fault
                record(self._state, decision, step)
                self._state, steps = environment.step(decision.action), step + 1
                if self._state.ended:
                    outcome = self._state.ended
                    break
        except (EngineError, RequestError) as error:
            fault = str(error)
        return {
            "instruction": instruction,
            "outcome": "faulted" if fault else outcome,
            "steps": steps,
            "stage": self._state.stage,
            "fault": fault,
        }


def _build_line(state: State, decision: Decision, model: str, task: str, number: int, step: int) -> dict[str, Any]:
    """A line of steps.jsonl; `oracle` is the oracle's phrase for the same state."""
    details = build_details(decision, model=model, robot=name_robot(task), episode=number, step=step)
    seen = {"instruction": state.observation.instruction, "proprio": state.observation.proprio}
    return {**details, "time": time.time(), **seen, "oracle": state.oracle}
