"""Episodes of a policy in parallel environments, into a run folder that can be continued.

RUN/meta.json holds the plan; RUN/episodes/<task>-<n> the n-th episode, seeded with plan.seed + n, for
the environment and, across /reset, for the policy. An episode counts once its meta.json has an
`outcome`; continuing a run plays all others again, and those that faulted.
"""

import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_local.data.film import write_film, write_gif
from vlm_local.data.runs import RunWriter
from vlm_local.errors import ConfigError, DataError, EngineError, RequestError
from vlm_local.files import encode_json
from vlm_local.lab.closed_loop.stage import Scene, Stage, apply_control
from vlm_local.lab.sources import Cast
from vlm_local.policy import Policy
from vlm_local.provenance import choose_deciding, join_parts, list_differences
from vlm_local.sim.levels import find_level
from vlm_local.sim.tasks import find_task
from vlm_local.types import Decision
from vlm_local.wire import build_details

IMAGE_SIZE = 256
_FLOOR_EPISODES = 20  # of each task are also played by random phrases, which take long to fail
_END_FRAMES = 5  # how long a film shows what came of it


@dataclass(frozen=True)
class Plan:
    """What is played. films: episodes of each task of which frames and film are kept; gif: also as GIF."""

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

    def __post_init__(self):
        find_level(self.level)
        for task in self.tasks:
            find_task(task)


# What may differ when a run is continued: it can grow.
_MAY_GROW = ("tasks", "episodes", "films", "gif")


def open_run(folder: Path, plan: Plan, meta: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Make or reopen the run; returns the (task, number) still to be played. meta: of the policy.

    Raises ConfigError where the folder holds another run.
    """
    here = json.loads(encode_json({"simulator": asdict(plan), **meta}))
    if (folder / "meta.json").exists():
        here = _continue(folder, here)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and holds no run; name another --out")
    RunWriter(folder, here).close()
    left = []
    for task in plan.tasks:
        for number in range(plan.episodes):
            episode = folder / "episodes" / f"{task}-{number}"
            if (read_outcome(episode) or {"outcome": "faulted"})["outcome"] == "faulted":
                shutil.rmtree(episode, ignore_errors=True)
                left.append((task, number))
    return left


def _continue(folder: Path, here: Mapping[str, Any]) -> dict[str, Any]:
    """meta.json of the whole run: as it began, but for the plan, which may have grown."""
    try:
        there = json.loads((folder / "meta.json").read_bytes())
        joined = join_parts(there, here)
        differences = list(list_differences(_list_settings(there), _list_settings(here)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}/meta.json is of no run of `sim` ({error!r}); name another --out") from None
    if differences:
        raise ConfigError(f"{folder} holds another run: {'; '.join(differences)}; name another --out")
    return joined | {"simulator": here["simulator"]}


def _list_settings(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all parts of a run."""
    plan = {name: value for name, value in meta["simulator"].items() if name not in _MAY_GROW}
    return {**plan, **choose_deciding(meta)}


def read_outcome(episode: Path) -> dict[str, Any] | None:
    """meta.json of an episode that was played to its end, else None."""
    try:
        meta = json.loads((episode / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if "outcome" in meta else None


def play(folder: Path, plan: Plan, cast: Cast, left: list[tuple[str, int]], workers: int, report: Callable) -> None:
    """Play what is left; `report(meta)` is called for every episode that ended."""
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    for job in left:
        jobs.put(job)
    done: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()
    actors = [_Actor(folder, plan, cast, worker, jobs, done, stop) for worker in range(min(workers, len(left)))]
    try:
        for actor in actors:
            actor.start()
        for _ in left:
            ended = done.get()
            if isinstance(ended, OSError):
                raise DataError(f"{folder}: {ended}; the same command goes on from here once it is mended") from ended
            if isinstance(ended, BaseException):
                raise ended
            report(ended)
    finally:
        stop.set()
        for actor in actors:
            actor.join()


class _Stopped(Exception):
    """The run ends before the episode: it is played again when the run goes on."""


class _Actor(threading.Thread):
    """One robot: an environment process, a policy, and the files of one episode after another."""

    def __init__(self, folder: Path, plan: Plan, cast: Cast, worker: int, jobs, done, stop: threading.Event):
        super().__init__(name=f"sim{worker}", daemon=True)
        self._folder, self._plan, self._cast, self._worker = folder, plan, cast, worker
        self._jobs, self._done, self._stop_asked = jobs, done, stop

    def run(self) -> None:
        stage = None
        try:
            stage = Stage(self._plan.level, IMAGE_SIZE)
            policy, whisper = self._cast.build(self._worker)
            while not self._stop_asked.is_set():
                task, number = self._jobs.get_nowait()
                self._done.put(self._play(stage, policy, whisper, task, number))
        except (queue.Empty, _Stopped):
            pass
        except BaseException as error:  # of the environment, the disk or the program: the run ends with it
            self._done.put(error)
        finally:
            if stage is not None:
                stage.close()

    def _play(self, stage: Stage, policy: Policy, whisper, task: str, number: int) -> dict[str, Any]:
        seed = self._plan.seed + number
        bounds = {"oracle_steps": stage.count_oracle_steps(task, seed, self._plan.max_steps)}
        if number < _FLOOR_EPISODES:
            bounds["random_steps"] = stage.count_random_steps(task, seed, self._plan.max_steps)
        writer = RunWriter(self._folder)
        keeps = number < self._plan.films
        episode = writer.start_episode(task, {"task": task, "level": self._plan.level, "seed": seed}, number)
        model = self._cast.metadata.get("model") or self._plan.policy
        film: list = []
        agreed = 0

        def record(scene: Scene, decision: Decision, step: int) -> None:
            nonlocal agreed
            agreed += decision.phrase == scene.oracle
            line = _build_line(scene, decision, model, task, number, step)
            writer.add_step(line, scene.observation.image if keeps else None)
            if keeps:
                film.append((scene.observation.image, line))

        scene = stage.reset(task, seed, drawn=keeps or self._cast.sees)
        outcome, last = self._run_episode(stage, policy, whisper, scene, seed, record)
        if film:
            still = [0.0] * 6 + film[-1][1]["action"][6:]  # the gripper stays as it was told
            end = {"phrase": outcome["outcome"], "step": outcome["steps"], "action": still}
            end["instruction"] = outcome["instruction"]
            film += [(last, end)] * _END_FRAMES
            write_film(episode / "film.mp4", film)
            if self._plan.gif:
                write_gif(episode / "film.gif", film)
        ended = {"task": task, "number": number, "seed": seed, **bounds, **outcome, "agreed": agreed}
        writer.end_episode(task, ended)
        return ended

    def _run_episode(self, stage: Stage, policy: Policy, whisper, scene: Scene, seed: int, record):
        """-> (outcome "success", "lost" (the chance is gone), "late" (max_steps) or "faulted" ..., last image)."""
        fault, outcome, steps = None, "late", 0
        instruction = scene.observation.instruction
        try:
            policy.reset(seed)
            for step in range(self._plan.max_steps):
                if self._stop_asked.is_set():
                    raise _Stopped
                whisper(scene)
                decision = policy.act(apply_control(self._plan.control, scene))
                fault = fault or decision.fault
                record(scene, decision, step)
                scene, steps = stage.step(decision.action), step + 1
                if scene.success or scene.lost:
                    outcome = "success" if scene.success else "lost"
                    break
        except (EngineError, RequestError) as error:
            fault = str(error)
        outcome = "faulted" if fault else outcome
        result = {"instruction": instruction, "outcome": outcome, "steps": steps, "stage": scene.stage, "fault": fault}
        return result, scene.observation.image


def _build_line(scene: Scene, decision: Decision, model: str, task: str, number: int, step: int) -> dict[str, Any]:
    """A line of steps.jsonl; `oracle` is the oracle's phrase for the same state."""
    details = build_details(decision, model=model, robot=task, episode=number, step=step)
    seen = {"instruction": scene.observation.instruction, "proprio": scene.observation.proprio}
    return {**details, "time": time.time(), **seen, "oracle": scene.oracle}
