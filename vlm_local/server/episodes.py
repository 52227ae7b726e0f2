"""Robots and their episodes.

No client says which episode it is in, and some never send /reset, so the server finds the ends of episodes itself.
Locks: `Robots` guards its table by a lock that is never held while a policy runs; `Robot.turn` is held by the one
request that runs for the robot.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np

from vlm_local.embodiments.frame import Frame, Sent
from vlm_local.errors import EngineError, RequestError
from vlm_local.policy import Policy, derive_seed
from vlm_local.server.access import DEFAULT_ROBOT
from vlm_local.server.state import Gripper, Hold, RobotStates
from vlm_local.server.watch import CameraWatch, NameWatch
from vlm_local.types import Decision, Observation
from vlm_local.wire import Message

FORGET_S = 600.0  # a robot that has been idle for so long makes room for another

_PLACES = 2  # one request of a robot runs, one waits


@dataclass(frozen=True)
class EpisodeSettings:
    """How episodes begin.

    seed: of the server; the seed of an episode without one of its own is derived from it.
    jump_m: a measured movement within one step above this begins a new episode: the arm was put elsewhere. Not where it
    comes as close to where its actions lead: it was held up, and slipped off.
    idle_s: so does a pause above this.
    follow_gripper: whether a gripper that someone else moved counts as it is measured (see state.Gripper.follow).
    """

    seed: int = 0
    jump_m: float = 0.1
    idle_s: float = 120.0
    follow_gripper: bool = True


@dataclass(frozen=True, eq=False)
class Step:
    """One answered step of a robot.

    episode, step: numbers, from 0. started_by: what began the episode: "reset", "first request", "instruction",
    "jump" or "idle". observation and decision are in the Bridge frame; sent: the action as the robot is told it.
    model: name of what answers.
    """

    episode: int
    step: int
    seed: int
    started_by: str
    observation: Observation
    decision: Decision
    sent: Sent
    model: str | None = None


class Robot:
    """One robot's policy and its present episode. The caller of `reset` or `act` holds `turn`."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        settings: EpisodeSettings,
        clock: Callable[[], float] = time.monotonic,
        states: RobotStates | None = None,
        build_frame: Callable[[], Frame] = Frame,
        model: str | None = None,
    ):
        """states: holds and grippers of all robots; None for some of its own. build_frame: of its state and actions.

        model: as Step has it.
        """
        self.name = name
        self._states = RobotStates() if states is None else states
        self._build_frame = build_frame
        self._frame = build_frame()
        self._policy = policy
        self._settings = settings
        self._clock = clock
        self._model = model
        self._episode = -1
        self._step = 0
        self._seed = 0
        self._started_by = ""
        self._instruction: str | None = None
        self._position: np.ndarray | None = None  # (3,) of the last step, metres
        self._aim: np.ndarray | None = None  # (3,) where the episode's actions lead from its first position, metres
        self._last = 0.0  # monotonic seconds, of the last step
        self.turn = threading.Lock()  # held by the request that runs
        self.num_inside = 0  # requests that run or wait; kept by Robots
        self.last_seen = 0.0  # monotonic seconds; kept by Robots
        self.last_number = -1  # of the last episode that has a step, which may be recorded; -1 before the first
        self.has_acted = False
        self._is_another = False  # from the next request on
        self._camera_watch, self._name_watch = CameraWatch(name), NameWatch(name)

    @property
    def is_new(self) -> bool:
        """Whether it has neither acted nor been reset."""
        return not self._started_by

    def continue_after(self, episode: int) -> None:
        """Number episodes from `episode` + 1 on: a robot that was removed comes back. Only while `is_new`."""
        self._episode = self.last_number = episode

    def begin_anew(self) -> None:
        """The next request may be another arm's: nothing of the episode holds for it. Without `turn`."""
        self._is_another = True

    def _let_go(self) -> None:
        """Forget the episode where `begin_anew` was called since the last request."""
        if self._is_another:
            self._is_another, self._started_by, self._instruction = False, "", None
            self._frame = self._build_frame()

    def reset(self, seed: int | None = None) -> tuple[int, int]:
        """Begin a new episode because the client said so; returns its (number, seed). seed: None derives one."""
        self._let_go()
        self._instruction = None
        self._start("reset", seed)
        self._states.set_gripper(self.name, replace(self._states.find_gripper(self.name), is_reset=True))
        return self._episode, self._seed

    def act(self, message: Message, is_gone: Callable[[], bool] = lambda: False) -> Step:
        """Answer one observation, in a new episode where the last one has ended.

        is_gone: whether nobody waits for the answer any more, asked when it is there. No arm carries it
        out then, so gripper and commanded pose stay as they were; only the step's number is used up.
        Raises RequestError where no instruction is known or the client is gone (499), and what the policy raises.
        """
        self._let_go()
        instruction = self._instruction if message.instruction is None else message.instruction
        if instruction is None:
            raise RequestError("instruction is null, but this episode has none yet; say what the robot shall do")
        position = None if message.state is None else message.state[:3]
        reason = self._find_end(instruction, position)
        if reason:
            self._start(reason, None)
        num_short = self._name_watch.note(reason)
        self._instruction, self._position, self._last = instruction, position, self._clock()
        observation = Observation(message.image, instruction, self._frame.read(message.state), self._step)
        self._step += 1
        try:
            observation, decision, gripper = self._decide(observation)
        except RequestError:
            self._step -= 1  # it never reached the model
            raise
        if is_gone():
            raise RequestError("the client went away before its answer was made", 499)
        self._states.set_gripper(self.name, gripper)
        self.has_acted, self.last_number = True, self._episode
        signs = {"same_picture": self._camera_watch.see(message.image), "short_episodes": num_short}
        if told := {name: count for name, count in signs.items() if count}:
            decision = replace(decision, extra={**decision.extra, **told})
        self._camera_watch.tell(decision.action)
        sent = self._frame.send(decision.action)
        self._aim = position if self._aim is None else self._aim
        self._advance(decision.action)
        episode = self._episode, observation.step, self._seed, self._started_by
        return Step(*episode, observation, decision, sent, self._model)

    def repeat(self, step: Step, count: int) -> list[Step]:
        """The same decision for the `count` control steps after it, for a client that asks less often than it moves."""
        steps = []
        for age in range(1, count + 1):
            observation = replace(step.observation, step=self._step)
            decision = replace(step.decision, timings_ms={}, extra={**step.decision.extra, "held": age})
            sent = self._frame.send_again(decision.action)
            steps.append(replace(step, step=self._step, observation=observation, decision=decision, sent=sent))
            self._advance(decision.action)
            self._step += 1
        return steps

    def _advance(self, action: np.ndarray) -> None:
        if self._aim is not None:
            self._aim = self._aim + action[:3]

    def _decide(self, observation: Observation) -> tuple[Observation, Decision, Gripper]:
        """Ask the policy, unless a person holds the robot. Returns what was asked, the answer, the gripper after it."""
        opening = observation.opening
        before = self._states.find_gripper(self.name)
        trusted = opening if self._settings.follow_gripper or before.command is None or before.is_reset else None
        gripper, moved_by = before.follow(trusted, observation.step == 0)
        asked = replace(observation, gripper=gripper.command)
        if (hold := self._states.find_hold(self.name)) is not None:
            return self._stand_still(observation, before, hold)
        try:
            decision = self._policy.act(asked)
        except EngineError:
            if (hold := self._states.find_hold(self.name)) is None:
                raise
            return self._stand_still(observation, before, hold)
        if (hold := self._states.find_hold(self.name)) is not None:  # pressed meanwhile: not one step more
            return self._stand_still(observation, before, hold)
        if moved_by is not None:
            decision = replace(decision, extra={**decision.extra, "gripper": moved_by})
        return asked, decision, gripper.tell(float(decision.action[6]))

    def _stand_still(
        self, observation: Observation, before: Gripper, hold: Hold
    ) -> tuple[Observation, Decision, Gripper]:
        gripper = before.keep(observation.opening)
        action = np.array([0.0] * 6 + [gripper.command])
        decision = Decision(action, fault=f"held by a person: {hold.reason}", extra={"hold": asdict(hold)})
        return replace(observation, gripper=gripper.command), decision, gripper

    def _find_end(self, instruction: str, position: np.ndarray | None) -> str | None:
        """Why the episode ended before this request, None where it goes on."""
        if self.is_new:
            return "first request"
        if self._step == 0:
            return None
        if instruction != self._instruction:
            return "instruction"
        if position is not None and self._position is not None:
            places = (self._position,) if self._aim is None else (self._position, self._aim)
            if min(np.linalg.norm(position - place) for place in places) > self._settings.jump_m:
                return "jump"
        if self._clock() - self._last > self._settings.idle_s:
            return "idle"
        return None

    def _start(self, reason: str, seed: int | None) -> None:
        keeps_number = self._step == 0 and not self.is_new  # as an episode without a step does
        episode = self._episode if keeps_number else self._episode + 1
        seed = derive_seed(self._settings.seed, self.name, episode) if seed is None else seed
        self._policy.reset(seed)  # where it fails nothing has begun, and the next request finds the same reason
        self._episode, self._step, self._seed, self._started_by = episode, 0, seed, reason
        self._position = self._aim = None
        self._frame.begin(was_reset=reason == "reset")


class Robots:
    """The robots that have called, by name. Any thread may use it."""

    def __init__(
        self,
        build: Callable[[str], Robot],
        max_robots: int,
        clock: Callable[[], float] = time.monotonic,
        is_free: Callable[[str], bool] = lambda name: False,
    ):
        """max_robots: beside the unnamed one, which always has its place. is_free: whether a robot's connection, by
        which alone it is known, has closed: it makes room before others do.
        """
        self._is_free = is_free
        self._build = build
        self._max_robots = max_robots
        self._clock = clock
        self._robots: dict[str, Robot] = {}
        self._forgotten: dict[str, int] = {}  # name -> Robot.last_number, which is not given twice
        self._lock = threading.Lock()

    @contextmanager
    def admit(self, name: str) -> Iterator[Robot]:
        """The robot of this name during the block, made at its first request; take its `turn` to be served.

        A robot is removed again if its first request fails. Raises RequestError: 503 if two of its requests are in
        flight already (one runs, one waits), 403 above max_robots.
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

    @property
    def names(self) -> list[str]:
        """Of those that are here now. Never waits: a robot that is being made may wait for the model."""
        return list(self._robots)

    def begin_anew(self, names: Iterable[str]) -> None:
        """Have robots begin a new episode at their next request, which may be another arm's."""
        with self._lock:
            for robot in (self._robots[name] for name in names if name in self._robots):
                robot.begin_anew()

    def _add(self, name: str) -> Robot:
        if name != DEFAULT_ROBOT and len(self._robots.keys() - {DEFAULT_ROBOT}) >= self._max_robots:
            self._remove(self._find_idle())
        robot = self._robots[name] = self._build(name)
        robot.continue_after(self._forgotten.pop(name, -1))
        return robot

    def _find_idle(self) -> Robot:
        """The longest idle of those that never acted, or else of those that did long ago."""
        idle = [robot for name, robot in self._robots.items() if name != DEFAULT_ROBOT and not robot.num_inside]
        idle.sort(key=lambda robot: (self._stays(robot), robot.last_seen))
        if not idle or (self._stays(idle[0]) and self._clock() - idle[0].last_seen < FORGET_S):
            raise RequestError(
                f"this server serves {self._max_robots} robots and has them; use their names, "
                f"or one that has been idle for {FORGET_S:g} s makes room",
                403,
            )
        return idle[0]

    def _stays(self, robot: Robot) -> bool:
        return robot.has_acted and not self._is_free(robot.name)

    def _remove(self, robot: Robot) -> None:
        del self._robots[robot.name]
        if robot.last_number >= 0:
            self._forgotten[robot.name] = robot.last_number
