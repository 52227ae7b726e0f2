"""The wrist of an AutoEval station: the law by which its robot server turns, and what it measures of it.

Written after manipulator_gym's widowx.py and the Interbotix arm below it, with scipy-free matrices of its own, so that
the tests do not ask the package whether the package is right.
"""

import math

import numpy as np

RESET = np.array([0.258325, 0.0, 0.19065])
RESET_MEASURED = np.array([-3.0892963, 1.5416106, -3.0891564])  # recorded at a station for a commanded (0, pi/2, 0)
SAG_M = np.array([-0.010025, 0.0, -0.01005])
DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])


def e2m(angles) -> np.ndarray:
    (cr, sr), (cp, sp), (cy, sy) = ((math.cos(angle), math.sin(angle)) for angle in angles)
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def m2e(matrix) -> np.ndarray:
    length = math.sqrt(matrix[0, 0] ** 2 + matrix[1, 0] ** 2)
    pitch = math.atan2(-matrix[2, 0], length)
    if length < 1e-6:
        return np.array([math.atan2(-matrix[1, 2], matrix[1, 1]), pitch, 0.0])
    return np.array([math.atan2(matrix[2, 1], matrix[2, 2]), pitch, math.atan2(matrix[1, 0], matrix[0, 0])])


def to_bridge(angles) -> np.ndarray:
    return m2e(e2m(angles) @ DOWN.T)


def from_bridge(angles) -> np.ndarray:
    return m2e(e2m(angles) @ DOWN)


class Wrist:
    """Commanded and measured pose of a station's arm; `act` adds an action as the station does."""

    def __init__(self, commanded=(0.0, math.pi / 2, 0.0), sag=True):
        self.commanded = m2e(e2m(commanded))
        self.position = RESET.copy()
        reset = e2m((0.0, math.pi / 2, 0.0))
        self._sag = e2m(RESET_MEASURED) @ reset.T if sag else np.eye(3)

    @property
    def measured(self) -> np.ndarray:
        return m2e(self._sag @ e2m(self.commanded))

    @property
    def bridge(self) -> np.ndarray:
        """The commanded rotation in the Bridge frame."""
        return to_bridge(self.commanded)

    @property
    def state(self) -> np.ndarray:
        """The 8 numbers that the station sends, float32 as it sends them."""
        return np.array([*self.position + SAG_M, *self.measured, 0.0, 0.39], np.float32)

    def act(self, action) -> None:
        action = np.clip(action, -2, 2)
        self.position = self.position + np.clip(action[:3], -0.02, 0.02)
        self.commanded = m2e(e2m(self.commanded + action[3:6]))
