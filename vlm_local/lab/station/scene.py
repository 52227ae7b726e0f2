"""What a station does between rollouts: it asks its detector how one ended, and has the scene put back.

AutoEval's questions, its order and its limits. Where the reset policy fails three times, a person is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_local.actions import build_action
from vlm_local.client import Detector, PolicyError
from vlm_local.embodiments import AUTOEVAL
from vlm_local.embodiments.frame import Frame
from vlm_local.errors import ConfigError
from vlm_local.lab.station.arm import StationArm
from vlm_local.lab.station.camera import StationCamera
from vlm_local.lab.station.client import JobEnded, StationClient
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.oracle import Oracle
from vlm_local.sim.task import Task
from vlm_local.sim.tasks import find_task
from vlm_local.sim.world import World

OPPOSITES = {
    "open_drawer": "close_drawer",
    "close_drawer": "open_drawer",
    "eggplant_in_sink": "eggplant_in_basket",
    "eggplant_in_basket": "eggplant_in_sink",
}
_QUESTIONS = {
    "drawer": "is the drawer open? answer yes or no",
    "sink": "is the eggplant in the sink or in the basket? answer sink or basket or invalid",
}
_ANSWERS = {"open_drawer": "yes", "close_drawer": "no", "eggplant_in_sink": "sink", "eggplant_in_basket": "basket"}
RESET_STEPS = {"drawer": 110, "sink": 80}
_TRIES = 3


class Judge:
    """A success detector, beside the simulator's truth. Keeps each picture and verdict as AutoEval's detectors do."""

    def __init__(self, detector: str, env: SimEnv, camera: StationCamera, folder: Path):
        """detector: "truth", or the URL of a server whose /answer is asked."""
        try:
            self._detector = None if detector == "truth" else Detector(detector)
        except ValueError as error:
            raise ConfigError(f"--detector is truth or a server's address: {error}") from None
        self._env, self._camera, self._folder = env, camera, folder
        self._count = 0
        self.confusion = {"both": 0, "detector alone": 0, "truth alone": 0, "neither": 0}

    def judge(self, task: Task) -> tuple[bool, bool]:
        """Whether the task is done, by the detector and in truth. Raises JobEnded."""
        truth = said = bool(task.is_done(self._env.world))
        image = self._camera.take()
        if self._detector is not None:
            try:
                said = bool(self._detector(_QUESTIONS[task.kind], image, _ANSWERS[task.name]))
            except (PolicyError, ValueError) as error:
                raise JobEnded(f"{type(error).__name__}: {error}") from None
        self._folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(self._folder / f"{self._count}_img.png")
        (self._folder / f"{self._count}_success.txt").write_text(str(said))
        self._count += 1
        return said, truth

    def judge_rollout(self, task: Task) -> tuple[bool, bool]:
        """As `judge`, counted in `confusion`."""
        said, truth = self.judge(task)
        names = {(True, True): "both", (True, False): "detector alone", (False, True): "truth alone"}
        self.confusion[names.get((said, truth), "neither")] += 1
        return said, truth


@dataclass
class _Situation:
    """The station's world with another task than the job's, as the oracle looks at it."""

    task: Task
    world: World


class OracleReset:
    """The simulator's oracle for the opposite task, in a station's frame."""

    def __init__(self, env: SimEnv, task: Task):
        self._oracle = Oracle(_Situation(task, env.world))
        self._frame = Frame(AUTOEVAL)

    def reset(self) -> None:
        self._frame.begin(was_reset=True)
        self._gripper = 1.0

    def act(self, state: np.ndarray) -> np.ndarray:
        """state: as StationArm.state. It looks at the world, not at a picture."""
        self._frame.read(state.astype(np.float64))
        primitive = self._oracle.primitive()
        if primitive.gripper:
            self._gripper = float(primitive.gripper > 0)
        return self._frame.send(build_action(primitive, self._gripper)).action


class SceneReset:
    """Has the scene of one station put back before each episode but the first."""

    def __init__(self, policy: str, env: SimEnv, camera: StationCamera, arm: StationArm, judge: Judge):
        """policy: "scripted", which puts it as the episode's seed says, "oracle", or a policy server's URL."""
        self._env, self._camera, self._arm, self._judge = env, camera, arm, judge
        self._goal = find_task(OPPOSITES[env.task.name])()
        self._policy: OracleReset | StationClient | None = None
        if policy != "scripted":
            self._policy = OracleReset(env, self._goal) if policy == "oracle" else StationClient(policy)
        self.tries = self.persons_called = 0

    def close(self) -> None:
        if isinstance(self._policy, StationClient):
            self._policy.close()

    def put_back(self, seed: int, is_first: bool, survive: Callable[[Callable], object]) -> None:
        """survive: runs what may raise JobEnded, and returns None where it did."""
        if self._policy is None or is_first:
            self._env.reset(seed=seed)
            return
        for number in range(_TRIES):
            self._arm.reset()
            # AutoEval's drawer is always reset; elsewhere the first try looks whether that is needed.
            if number == 0 and self._goal.kind != "drawer" and self._is_back(survive):
                return
            self.tries += 1
            self._play(self._policy, survive)
            self._arm.reset()
            if self._is_back(survive):
                return
        self.persons_called += 1
        self._env.reset(seed=seed)

    def _is_back(self, survive: Callable[[Callable], object]) -> bool:
        verdict = survive(lambda: self._judge.judge(self._goal))
        return isinstance(verdict, tuple) and verdict[0]

    def _play(self, policy: OracleReset | StationClient, survive: Callable[[Callable], object]) -> None:
        survive(policy.reset)
        for _ in range(RESET_STEPS[self._goal.kind]):
            if isinstance(policy, OracleReset) and self._goal.is_done(self._env.world):
                return
            action = survive(lambda: self._ask(policy))
            if isinstance(action, np.ndarray):
                self._arm.act(action)
            self._env.judge()

    def _ask(self, policy: OracleReset | StationClient) -> np.ndarray:
        if isinstance(policy, OracleReset):
            return policy.act(self._arm.state)
        return policy.act(self._camera.take(), self._goal.words[0], self._arm.state)
