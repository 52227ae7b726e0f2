"""What to do in SIMPLER's tasks, from true poses: above the thing, down, close, up, over the goal, down, open, up.

The oracle wants a place, a yaw and a gripper; `PutOracle.speak` says the signs of what is missing from where the hand
is told to be, which it reaches half a step later.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlm_local.types import Primitive

_TIPS_M = 0.016  # of the tips below the hand's own place
_HOVER_M = 0.03  # of the tips above the thing's top
_CLEAR_M = 0.03  # of what is carried above the goal's top
_GAP_M = 0.004  # between what is carried and the goal's top: then open
_OFF_M, _OFF_RAD = 0.02, 0.1  # beside the grasp, on the way down: then up again
_CLOSING_STEPS, _OPENING_STEPS = 3, 2
_LOST_STEPS = 2  # without a touch of both fingers, which may flicker


class Body(NamedTuple):
    """position: float64 (3,) m of its centre, from the robot's base. rotation: (3, 3). sizes: (3,) m, own axes."""

    position: np.ndarray
    rotation: np.ndarray
    sizes: np.ndarray

    @property
    def half_height(self) -> float:
        return float(np.abs(self.rotation[2]) @ self.sizes) / 2

    @property
    def top(self) -> float:
        return float(self.position[2]) + self.half_height

    @property
    def bottom(self) -> float:
        return float(self.position[2]) - self.half_height

    @property
    def yaw(self) -> float:
        """Of its longest horizontal axis, rad."""
        lying = np.linalg.norm(self.rotation[:2], axis=0) * self.sizes
        x, y = self.rotation[:2, int(np.argmax(lying))]
        return float(np.arctan2(y, x))


@dataclass(frozen=True)
class Scene:
    """hand: float64 (3,) m and yaw: rad, where the hand is told to be, from the robot's base.

    lag: float64 (3,) m, from where the hand is to where it is told to be. is_held: both fingers touch the thing.
    is_placed: it lies as the task wants it.
    """

    hand: np.ndarray
    yaw: float
    lag: np.ndarray
    thing: Body
    goal: Body
    is_held: bool
    is_placed: bool


class PutOracle:
    """One episode at a time: `reset`, then `speak` whenever a phrase is due and `follow` after every control step."""

    def reset(self, step_m: float, step_rad: float) -> None:
        """An episode begins. step_m, step_rad: what a phrase moves and turns while it is kept."""
        self._sizes = np.array([step_m] * 3 + [step_rad])
        self._shut_steps, self._open_steps, self._lost_steps = 0, _OPENING_STEPS, 0
        self._is_low, self._grip_m = False, 0.0

    def follow(self, is_shut: bool, scene: Scene) -> None:
        """A control step was carried out. is_shut: as the gripper was told."""
        self._shut_steps, self._open_steps = (self._shut_steps + 1, 0) if is_shut else (0, self._open_steps + 1)
        self._lost_steps = self._lost_steps + 1 if is_shut and not scene.is_held else 0
        self._is_low = self._open_steps >= _OPENING_STEPS and self._decide_low(scene)
        if not is_shut:
            self._grip_m = float(scene.hand[2]) - scene.thing.bottom

    def speak(self, scene: Scene) -> tuple[Primitive, bool]:
        """Signs of what is missing, and whether the gripper is to be shut."""
        missing, is_shut = self.aim(scene)
        x, y, z, yaw = (np.sign(missing) * (np.abs(missing) > self._sizes / 2)).astype(int).tolist()
        return Primitive(x, y, z, 0, yaw), is_shut

    def aim(self, scene: Scene) -> tuple[np.ndarray, bool]:
        """float64 (4,): x, y, z (m), yaw (rad) to go, and whether the gripper is to be shut.

        Nothing moves while it opens or closes.
        """
        missing, is_shut = self._aim_shut(scene) if self._shut_steps else self._aim_open(scene)
        return (missing if is_shut == bool(self._shut_steps) else np.zeros(4)), is_shut

    def _aim_open(self, scene: Scene) -> tuple[np.ndarray, bool]:
        rise = scene.thing.top + _HOVER_M + _TIPS_M - scene.hand[2]
        if self._open_steps < _OPENING_STEPS:
            return np.zeros(4), False
        if scene.is_placed:
            return np.array([0.0, 0.0, max(rise, 0.0), 0.0]), False
        missing = _measure(scene)
        if self._is_low:
            return missing, bool(missing[2] > -self._sizes[2] / 2)
        if rise > self._sizes[2]:  # straight up, lest the thing is dragged along
            missing[:] = 0.0
        missing[2] = rise
        return missing, False

    def _aim_shut(self, scene: Scene) -> tuple[np.ndarray, bool]:
        if self._shut_steps < _CLOSING_STEPS:
            return np.zeros(4), True
        if self._lost_steps >= _LOST_STEPS:
            return np.zeros(4), False
        aside = scene.goal.position[:2] - scene.thing.position[:2] - scene.lag[:2]
        if (np.abs(aside) <= self._sizes[:2]).all():
            # Down by the hand: what is held at one end hangs lower than it will lie.
            gap = scene.hand[2] - self._grip_m - scene.goal.top
            return np.array([*aside, _GAP_M - gap, 0.0]), bool(gap > _GAP_M + self._sizes[2] / 2)
        rise = _CLEAR_M - (scene.thing.bottom + scene.lag[2] - scene.goal.top)
        if rise > _CLEAR_M / 2:
            aside[:] = 0.0
        return np.array([*aside, rise, 0.0]), True

    def _decide_low(self, scene: Scene) -> bool:
        """Whether the hand is above the grasp, or on its way down and not far off."""
        spare = np.array([_OFF_M] * 3 + [_OFF_RAD]) if self._is_low else 1e-6
        return bool((np.abs(_measure(scene)) <= self._sizes / 2 + spare)[[0, 1, 3]].all())


def _measure(scene: Scene) -> np.ndarray:
    """float64 (4,): x, y, z (m), yaw (rad) to go to where the hand grasps the thing."""
    place = np.append(scene.thing.position[:2], max(scene.thing.position[2], _TIPS_M))
    return np.append(place - scene.hand, _wrap(scene.thing.yaw - scene.yaw, _find_symmetry(scene.thing)))


def _find_symmetry(thing: Body) -> float:
    """The turn after which a grasp across the thing is the same, rad: a quarter for a square one."""
    lying = np.sort(np.linalg.norm(thing.rotation[:2], axis=0) * thing.sizes)
    return np.pi / 2 if lying[2] - lying[1] < 0.005 else np.pi


def _wrap(angle: float, symmetry: float) -> float:
    return (angle + symmetry / 2) % symmetry - symmetry / 2
