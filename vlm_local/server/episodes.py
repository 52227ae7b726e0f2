"""Robots and their episodes. No client says which episode it is in, and some never reset."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np

from vlm_local.errors import EngineError, RequestError
from vlm_local.policy import Policy, derive_seed
from vlm_local.server.access import DEFAULT_ROBOT
from vlm_local.server.state import Gripper, Hold, RobotStates
from vlm_local.types import Decision, Observation
from vlm_local.wire import Message

FORGET_S = 600.0  # a robot that has been idle for so long makes room for another

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
        states: RobotStates | None = None,
    ):
        """states: holds and grippers of all robots; None for some of its own."""
        self.name = name
        self._states = RobotStates() if states is None else states
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
        self.last_seen = 0.0  # monotonic seconds; kept by Robots
        self.has_acted = False

    @property
    def is_new(self) -> bool:
        """Whether it has neither acted nor been reset."""
        return not self._started_by

    @property
    def episode(self) -> int:
        return self._episode

    def continue_after(self, episode: int) -> None:
        """Number the episodes from the next one on: this robot was forgotten and comes back. Called while it is new."""
        self._episode = episode

    def reset(self, seed: int | None = None) -> tuple[int, int]:
        """End the episode at the client's word; returns (number, seed) of the new one."""
        self._instruction = None
        self._start("reset", seed)
        self._states.set_gripper(self.name, replace(self._states.find_gripper(self.name), is_reset=True))
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
        self.has_acted = True
        return Step(self._episode, observation.step, self._seed, self._started_by, observation, decision)

    def repeat(self, step: Step, count: int) -> list[Step]:
        """The same decision for the `count` control steps after it, for a client that asks less often than it moves."""
        steps = []
        for age in range(1, count + 1):
            observation = replace(step.observation, step=self._step)
            decision = replace(step.decision, timings_ms={}, extra={**step.decision.extra, "held": age})
            steps.append(replace(step, step=self._step, observation=observation, decision=decision))
            self._step += 1
        return steps

    def _decide(self, observation: Observation) -> tuple[Observation, Decision]:
        """Ask the policy, unless a person holds the robot. Returns what was asked and the answer."""
        opening = None if observation.proprio is None else float(observation.proprio[6])
        before = self._states.find_gripper(self.name)
        gripper, moved_by = before.follow(opening, observation.step == 0)
        asked = replace(observation, gripper=gripper.command)
        hold = self._states.find_hold(self.name)
        if hold is None:
            try:
                decision = self._policy.act(asked)
                hold = self._states.find_hold(self.name)  # pressed meanwhile: the arm takes not one step more
            except EngineError:
                hold = self._states.find_hold(self.name)
                if hold is None:
                    raise
        if hold is not None:
            return self._stand_still(observation, before.keep(opening), hold)
        if moved_by is not None:
            decision = replace(decision, extra={**decision.extra, "gripper": moved_by})
        self._states.set_gripper(self.name, gripper.tell(float(decision.action[6])))
        return asked, decision

    def _stand_still(self, observation: Observation, gripper: Gripper, hold: Hold) -> tuple[Observation, Decision]:
        self._states.set_gripper(self.name, gripper)
        action = np.array([0.0] * 6 + [gripper.command])
        decision = Decision(action, fault=f"held by a person: {hold.reason}", extra={"hold": asdict(hold)})
        return replace(observation, gripper=gripper.command), decision

    def _find_end(self, instruction: str, position: np.ndarray | None) -> str | None:
        """Why the episode ended before this request, None where it goes on."""
        if self.is_new:
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
        if self._step > 0 or self.is_new:  # an episode without a step keeps its number
            self._episode += 1
        self._step = 0
        self._position = None
        self._started_by = reason
        self._seed = derive_seed(self._settings.seed, self.name, self._episode) if seed is None else seed
        self._policy.reset(self._seed)


class Robots:
    """The robots that have called, by name."""

    def __init__(self, build: Callable[[str], Robot], max_robots: int, clock: Callable[[], float] = time.monotonic):
        """max_robots: beside the unnamed one, which always has its place."""
        self._build = build
        self._max_robots = max_robots
        self._clock = clock
        self._robots: dict[str, Robot] = {}
        self._forgotten: dict[str, int] = {}  # name -> its last episode's number, which is not given twice
        self._lock = threading.Lock()

    @contextmanager
    def admit(self, name: str) -> Iterator[Robot]:
        """One of the two places of a robot; take its `turn` to be served.

        A robot is made at its first call, and removed where that fails. Raises RequestError: 503 where two of
        its requests are inside, 403 above max_robots.
        """
        with self._lock:
            robot = self._robots.get(name) or self._add(name)
            if robot.num_inside >= _PLACES:
                raise RequestError(f"robot {name!r} has one request running and one waiting; send one at a time", 503)
            robot.num_inside += 1
            robot.last_seen = self._clock()
        try:
            yield robot
        finally:
            with self._lock:
                robot.num_inside -= 1
                if robot.is_new and not robot.num_inside:
                    self._remove(robot)

    def _add(self, name: str) -> Robot:
        if name != DEFAULT_ROBOT and len(self._robots.keys() - {DEFAULT_ROBOT}) >= self._max_robots:
            self._remove(self._find_idle())
        robot = self._robots[name] = self._build(name)
        robot.continue_after(self._forgotten.pop(name, -1))
        return robot

    def _find_idle(self) -> Robot:
        """The longest idle of those that never acted, or else of those that did long ago."""
        idle = [robot for name, robot in self._robots.items() if name != DEFAULT_ROBOT and not robot.num_inside]
        idle.sort(key=lambda robot: (robot.has_acted, robot.last_seen))
        if not idle or (idle[0].has_acted and self._clock() - idle[0].last_seen < FORGET_S):
            raise RequestError(
                f"this server serves {self._max_robots} robots and has them; use their names, "
                f"or one that has been idle for {FORGET_S:g} s makes room",
                403,
            )
        return idle[0]

    def _remove(self, robot: Robot) -> None:
        del self._robots[robot.name]
        if robot.episode >= 0:
            self._forgotten[robot.name] = robot.episode
