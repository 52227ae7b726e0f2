"""The arm of an AutoEval station in our simulator: its law, its limits, and the numbers it sends.

The robot server adds an action to the pose that was last commanded; what it sends is measured, below the commanded
pose by a sag that was recorded at a station. Everything is in the base frame. The reset pose is where a station has it;
the furniture of our scenes stands elsewhere than a station's, so the box is fitted to it.
"""

from dataclasses import dataclass

import numpy as np

from vlm_local.embodiments import AUTOEVAL, load_embodiment
from vlm_local.embodiments.rotations import DOWN, euler_to_matrix, matrix_to_euler
from vlm_local.safety import load_workspaces
from vlm_local.sim.environment import SimEnv

SAG_M = np.array([-0.010025, 0.0, -0.01005])
_RESET_MEASURED = np.array([-3.0892963, 1.5416106, -3.0891564])  # for a commanded 0, pi/2, 0
# Added to a station's lowest and highest x, y, z, m, because our furniture stands elsewhere: the drawer further forward
# and left, the sink's floor lower. The height of the reset pose below or above the box's top stays a station's.
_MOVED_M = {
    "drawer": np.array([[0.025, 0.055, 0.0], [0.025, 0.055, 0.0]]),
    "sink": np.array([[0.0, 0.0, -0.0751], [0.0, 0.0, 0.0]]),
}
_MAX_MAGNITUDE, _MAX_STEP_M = 2.0, 0.02  # of any component, and of x, y, z
_REVERSED = -0.5  # what is executed of an action while a motor's effort is too high
_MAX_PUSH_N = 100.0  # stands for that effort: all that the arm touches pushes it harder than this
_CLOSED_READING, _OPEN_READING = 0.07, 0.393


@dataclass(frozen=True, eq=False)
class Executed:
    """What became of an action. executed: float64 (7,) after clipping. clipped: whether that changed it.

    reversed: whether the arm met with so much resistance that the step went back instead.
    dropped: whether the arm could not reach the pose and ignored the step. commanded: angles after it, (3,) rad.
    """

    executed: np.ndarray
    clipped: bool
    reversed: bool
    dropped: bool
    commanded: np.ndarray


def fit_box(kind: str) -> np.ndarray:
    """(2, 3) m: lowest and highest x, y, z of the station's workspace, as it lies in our scene of that kind."""
    return np.array(load_workspaces()[f"autoeval-{kind}"].ranges).T + _MOVED_M[kind]


class StationArm:
    """Drives the arm of one SimEnv as a station does."""

    def __init__(self, env: SimEnv, has_box: bool = True):
        """has_box: whether targets are cut to the box of the station that has the task."""
        self._env = env
        reset = np.array(load_embodiment(AUTOEVAL).reset_pose)
        self._reset_m, self._reset_rad = reset[:3], reset[3:]
        self._sag = euler_to_matrix(_RESET_MEASURED) @ euler_to_matrix(self._reset_rad).T
        self.box = fit_box(env.task.kind) if has_box else None

    def reset(self) -> None:
        """`env.reset` of a station: the gripper opens, the arm moves to its reset pose."""
        self._env.world.put_arm(self._reset_m + SAG_M)
        self._position, self.commanded = self._reset_m, self._reset_rad
        self._move(self._position, self.commanded, 1.0)

    @property
    def state(self) -> np.ndarray:
        """float32 (8,) as the station sends it: x, y, z, base-frame roll, pitch, yaw, 0, gripper 0..0.39."""
        proprio = self._env.world.proprio
        angles = matrix_to_euler(euler_to_matrix(proprio[3:6]) @ DOWN)
        gripper = _CLOSED_READING + proprio[6] * (_OPEN_READING - _CLOSED_READING)
        return np.array([*proprio[:3], *angles, 0.0, gripper], np.float32)

    def act(self, action: np.ndarray) -> Executed:
        """One step, through AutoEval's wrappers in their order."""
        executed = np.clip(action, -_MAX_MAGNITUDE, _MAX_MAGNITUDE)
        is_reversed = self._env.world.push_back > _MAX_PUSH_N
        if is_reversed:
            executed[:6] *= _REVERSED
        here = self._env.world.tips
        if self.box is not None:
            executed[:3] = np.clip(here + executed[:3], *self.box) - here
        executed[:3] = np.clip(executed[:3], -_MAX_STEP_M, _MAX_STEP_M)
        executed[6] = float(executed[6] > 0.5)
        position = self._position + executed[:3]
        angles = matrix_to_euler(euler_to_matrix(self.commanded + executed[3:6]))
        is_taken = self._move(position, angles, executed[6])
        if is_taken:
            self._position, self.commanded = position, angles
        clipped = not is_reversed and not np.allclose(executed[:6], action[:6], rtol=0, atol=1e-9)
        return Executed(executed, clipped, is_reversed, not is_taken, self.commanded)

    def _move(self, position: np.ndarray, angles: np.ndarray, opening: float) -> bool:
        rotation = self._sag @ euler_to_matrix(angles) @ DOWN.T
        return self._env.world.move_arm(position + SAG_M, rotation, opening)
