"""Robots and their episodes. No client says which episode it is in, and some never reset."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np

from vlm_local.errors import EngineError, RequestError
from vlm_local.policy import Policy, derive_seed
from vlm_local.server.kept import Gripper, Hold, Kept
from vlm_local.types import Decision, Observation
from vlm_local.wire import Message

_PLACES = 2  # one request of a robot runs, one waits


@dataclass(frozen=True)
class EpisodeSettings:
    """seed: of the server. jump_m: a measured movement within one step that only a new start explains."""

    seed: int = 0
    jump_m: float = 0.1
    idle_s: float = 120.0


@dataclass(frozen=True, eq=False)
class Step:
    """One answered step of a robot. started_by: "reset", "first request", "instruction", "jump", "idle"."""

    episode: int
    step: int
    seed: int
    started_by: str
    observation: Observation
    decision: Decision


class Robot:
    """One robot's policy and the episode it is in. Whoever calls `reset` or `act` holds its `turn`."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        settings: EpisodeSettings,
        clock: Callable[[], float] = time.monotonic,
        kept: Kept | None = None,
    ):
        """kept: holds and grippers of all robots; None for some of its own."""
        self.name = name
        self._kept = Kept() if kept is None else kept
        self._policy = policy
        self._settings = settings
        self._clock = clock
        self._episode = -1
        self._step = 0
        self._seed = 0
        self._started_by = ""
        self._instruction: str | None = None
        self._position: np.ndarray | None = None  # (3,) of the last step, metres
        self._last = 0.0
        self.turn = threading.Lock()  # held by the request that runs
        self.num_inside = 0  # requests that run or wait; kept by Robots

    @property
    def is_new(self) -> bool:
        """Whether it has neither acted nor been reset."""
        return self._episode < 0

    def reset(self, seed: int | None = None) -> tuple[int, int]:
        """End the episode at the client's word; returns (number, seed) of the new one."""
        self._instruction = None
        self._start("reset", seed)
        self._kept.set_gripper(self.name, replace(self._kept.find_gripper(self.name), is_reset=True))
        return self._episode, self._seed

    def act(self, message: Message) -> Step:
        """Raises RequestError where no instruction is known, and what the policy raises."""
        instruction = self._instruction if message.instruction is None else message.instruction
        if instruction is None:
            raise RequestError("instruction is null, but this episode has none yet; say what the robot shall do")
        position = None if message.proprio is None else message.proprio[:3]
        reason = self._find_end(instruction, position)
        if reason:
            self._start(reason, None)
        self._instruction, self._position, self._last = instruction, position, self._clock()
        observation = Observation(message.image, instruction, message.proprio, self._step)
        self._step += 1
        try:
            observation, decision = self._decide(observation)
        except RequestError:
            self._step -= 1  # it never reached the model
            raise
        return Step(self._episode, observation.step, self._seed, self._started_by, observation, decision)

    def _decide(self, observation: Observation) -> tuple[Observation, Decision]:
        """Ask the policy, unless a person holds the robot. Returns what was asked and the answer."""
        opening = None if observation.proprio is None else float(observation.proprio[6])
        before = self._kept.find_gripper(self.name)
        gripper, moved_by = before.follow(opening, observation.step == 0)
        asked = replace(observation, gripper=gripper.command)
        hold = self._kept.find_hold(self.name)
        if hold is None:
            try:
                decision = self._policy.act(asked)
                hold = self._kept.find_hold(self.name)  # pressed meanwhile: the arm takes not one step more
            except EngineError:
                hold = self._kept.find_hold(self.name)
                if hold is None:
                    raise
        if hold is not None:
            return self._stand_still(observation, before.keep(opening), hold)
        if moved_by is not None:
            decision = replace(decision, extra={**decision.extra, "gripper": moved_by})
        self._kept.set_gripper(self.name, gripper.tell(float(decision.action[6])))
        return asked, decision

    def _stand_still(self, observation: Observation, gripper: Gripper, hold: Hold) -> tuple[Observation, Decision]:
        self._kept.set_gripper(self.name, gripper)
        action = np.array([0.0] * 6 + [gripper.command])
        decision = Decision(action, fault=f"held by a person: {hold.reason}", extra={"hold": asdict(hold)})
        return replace(observation, gripper=gripper.command), decision

    def _find_end(self, instruction: str, position: np.ndarray | None) -> str | None:
        """Why the episode ended before this request, None where it goes on."""
        if self._episode < 0:
            return "first request"
        if self._step == 0:
            return None
        if instruction != self._instruction:
            return "instruction"
        known = position is not None and self._position is not None
        if known and np.linalg.norm(position - self._position) > self._settings.jump_m:
            return "jump"
        if self._clock() - self._last > self._settings.idle_s:
            return "idle"
        return None

    def _start(self, reason: str, seed: int | None) -> None:
        if self._step > 0 or self._episode < 0:  # an episode without a step keeps its number
            self._episode += 1
        self._step = 0
        self._position = None
        self._started_by = reason
        self._seed = derive_seed(self._settings.seed, self.name, self._episode) if seed is None else seed
        self._policy.reset(self._seed)


class Robots:
    """The robots that have called, by name."""

    def __init__(self, build: Callable[[str], Robot], max_robots: int):
        self._build = build
        self._max_robots = max_robots
        self._robots: dict[str, Robot] = {}
        self._lock = threading.Lock()

    @contextmanager
    def admit(self, name: str) -> Iterator[Robot]:
        """One of the two places of a robot; take its `turn` to be served.

        A robot is made at its first call, and forgotten where that comes to nothing. Raises
        RequestError where robot or house is full.
        """
        with self._lock:
            robot = self._robots.get(name) or self._add(name)
            if robot.num_inside >= _PLACES:
                raise RequestError(f"robot {name!r} has one request running and one waiting; send one at a time", 503)
            robot.num_inside += 1
        try:
            yield robot
        finally:
            with self._lock:
                robot.num_inside -= 1
                if robot.is_new and not robot.num_inside:
                    del self._robots[name]

    def _add(self, name: str) -> Robot:
        if len(self._robots) >= self._max_robots:
            raise RequestError(f"this server serves {self._max_robots} robots and has them; use their names", 403)
        robot = self._robots[name] = self._build(name)
        return robot
