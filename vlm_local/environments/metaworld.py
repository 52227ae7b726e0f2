"""Meta-World's 50 tasks (Sawyer arm, Yu et al., 2020) as TaskEnvironments: `.venv/bin/pip install -e '.[metaworld]'`.

Meta-World's world frame has the arm at the origin, facing +y. Ours is the base frame: forward = +y, left = -x, up = +z.
Its action moves the target that the hand follows by at most 0.01 m an axis, and turns nothing; its gripper takes an
effort. The oracle speaks for Meta-World's scripted experts (`PhraseQuantiser`).
"""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from vlm_local.actions import StepTable, check_action, find_first_command
from vlm_local.environments import METAWORLD, Outcome, Suite, import_package
from vlm_local.files import read_json_object
from vlm_local.sim.rendering import Camera
from vlm_local.types import Observation, Primitive

STEP_M = 0.01  # what Meta-World's action 1 adds to an axis of the target
GRIP_EFFORT = 0.6  # behind "close gripper"; at 1 many things are squeezed out
# Two experts close weakly, and so slowly, while they come down at more than half speed; their phrase waits until then.
_WEAK, _DESCENDS = 0.3, 0.5
MAX_STEPS = 500  # Meta-World raises at the next one
_CAMERA, _CAMERA_POSITION_M = "corner2", (0.75, 0.075, 0.7)  # the view that others publish results with
_STAGES = ("done",)


class MetaWorldEnv:
    """One task. image_size: pixels a side, None draws nothing."""

    def __init__(self, task: str, image_size: int | None = None):
        self._instructions = load_instructions()
        self._task, self._image_size = task, image_size
        self._env, self._expert = _make(task)
        self.configure()
        self._camera: Camera | None = None

    @property
    def observation(self) -> Observation:
        return Observation(self._image, self._instructions[self._task], self.proprio, self._step)

    @property
    def wrong_instruction(self) -> str:
        """Of the next task in the alphabet: no scene of Meta-World has two."""
        names = list(self._instructions)
        return self._instructions[names[(names.index(self._task) + 1) % len(names)]]

    @property
    def proprio(self) -> np.ndarray:
        """float64 (7,): hand x, y, z (m, base frame), no rotation, opening. The rest of Meta-World's state is kept."""
        x, y, z, opening = self._state[:4]
        return np.array([y, -x, z, 0.0, 0.0, 0.0, min(max(opening, 0.0), 1.0)])

    @property
    def expert_action(self) -> np.ndarray:
        """float64 (4,): what Meta-World's scripted expert does now, in its own units; each cut to -1..1."""
        return self._wanted

    def configure(self, effort: float = GRIP_EFFORT, scale: float = 1.0, hold: int = 1) -> None:
        """For the episodes that follow. effort: of a closed gripper, 0 to 1.

        scale: size of the oracle's phrases, in STEP_M. hold: control steps for which its caller keeps a phrase.
        """
        self._effort = effort
        self._quantiser = PhraseQuantiser(scale, hold)

    def reset(self, seed: int) -> None:
        self._env.seed(seed)  # `reset(seed=)` is ignored
        self._state, _ = self._env.reset()
        self._step, self._done = 0, False
        self._quantiser.reset()
        self._command = find_first_command(self.proprio[6])
        self._look()

    def step(self, action: np.ndarray) -> Outcome:
        """Rotations change nothing, steps over 0.01 m are cut. Raises ConfigError unless action is 7 finite numbers."""
        action = check_action(action)
        forward, left, up = action[:3] / STEP_M
        self._command = 1.0 if action[6] > 0.5 else 0.0
        return self.step_raw(np.array([-left, forward, up, -1.0 if self._command else self._effort]))

    def step_raw(self, action: np.ndarray) -> Outcome:
        """action: (4,) as Meta-World's own. success: at this step or before."""
        sent = np.clip(action, -1.0, 1.0)
        self._quantiser.follow(self._wanted[:3], sent[:3])
        self._state, *_, info = self._env.step(sent)
        self._step += 1
        self._done = self._done or bool(info["success"])
        self._look()
        return Outcome(self._done, False, int(self._done))

    def ask_oracle(self) -> Primitive:
        x, y, z = self._quantiser.speak(self._wanted[:3])
        effort, descends = self._wanted[3], self._wanted[2] < -_DESCENDS
        is_early = 0 < effort < _WEAK and descends and self._command == 1.0
        shut = effort > 0 and not is_early
        return Primitive(y, -x, z, gripper=int((0.0 if shut else 1.0) - self._command))

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None
        self._env.close()

    def _look(self) -> None:
        self._wanted = np.clip(np.asarray(self._expert.get_action(self._state), np.float64), -1.0, 1.0)
        if self._image_size and self._camera is None:
            self._camera = _open_camera(self._env.model, self._image_size)
        # The camera is mounted upside down: a turn by 180 degrees, no mirror.
        drawn = self._camera.render(self._env.data)[::-1, ::-1] if self._camera else np.zeros((0, 0, 3), np.uint8)
        self._image = np.ascontiguousarray(drawn)


class PhraseQuantiser:
    """Error diffusion (Floyd and Steinberg, 1976) over time: what a phrase could not say is said by a later one.

    Each axis keeps the sum of what the expert wanted and was not sent. That sum is limited to one phrase, so that
    other policies' actions leave no debt behind.
    """

    def __init__(self, scale: float, hold: int):
        """scale: what a phrase moves in a control step, as Meta-World's action. hold: steps it is kept."""
        self._scale, self._hold = scale, hold
        self.reset()

    def reset(self) -> None:
        self._left = np.zeros(3)

    def speak(self, wanted: np.ndarray) -> tuple[int, int, int]:
        """wanted: (3,) of -1..1, the expert's action now -> signs."""
        due = self._left + wanted * self._hold
        x, y, z = (np.sign(due) * (np.abs(due) >= self._scale * self._hold / 2)).astype(int).tolist()
        return x, y, z

    def follow(self, wanted: np.ndarray, sent: np.ndarray) -> None:
        """One control step was carried out: both (3,) of -1..1."""
        most = self._scale * self._hold
        self._left = np.clip(self._left + wanted - sent, -most, most)


@cache
def load_instructions() -> dict[str, str]:
    """Task -> one plain sentence; Meta-World has none. Colours are those of the picture, marks are its goal sites."""
    return read_json_object(Path(__file__).with_name("metaworld_instructions.json"))


def _import() -> tuple[Any, ...]:
    """Meta-World's modules."""
    return import_package(METAWORLD, "metaworld.sawyer_xyz_env", "metaworld.env_dict", "metaworld.policies")


def _make(task: str) -> tuple[Any, Any]:
    """Meta-World's environment, in which a seed decides the whole episode, and its expert."""
    sawyer, environments, policies = _import()
    sawyer.SawyerMocapBase.reset_mocap_welds = _reset_mocap_welds
    warnings.filterwarnings("ignore", "Constant.s. may be too high")  # of each step: experts ask for more than 1
    env = environments.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"](seed=0)
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True  # else the scene is drawn from numpy's global state
    return env, policies.ENV_POLICY_MAP[task]()


def _reset_mocap_welds(self) -> None:
    """Meta-World 3.0.0's method for a MuJoCo that keeps 12 numbers for a weld, where it writes 11 and fails."""
    welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD
    self.model.eq_data[welds, :11] = (0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5)


def _open_camera(model: mujoco.MjModel, size: int) -> Camera:
    model.cam_pos[model.camera(_CAMERA).id] = _CAMERA_POSITION_M
    model.vis.quality.offsamples = 0
    return Camera(model, _CAMERA, size, sites=True)


_import()

SUITE = Suite(
    name=METAWORLD,
    stages=dict.fromkeys(load_instructions(), _STAGES),
    levels=("normal",),
    control_hz=80,
    max_steps=MAX_STEPS,
    limit=MAX_STEPS,
    embodiment="metaworld",
    table=StepTable(STEP_M, STEP_M, STEP_M),
    open=lambda task, level, image_size: MetaWorldEnv(task, image_size),
)
