"""What to do in LIBERO's pick-and-place tasks, from the true poses: above the thing, down, close, up, over, open.

The oracle wants a place, a yaw and a gripper; `PickOracle.speak` says the signs of what is missing. A grasp lies across
the thing's narrow side or, where that is too wide, across its rim, with the yaw and side that keep the fingers clear of
all others.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mujoco
import numpy as np

from vlm_local.types import Primitive

_WIDEST_M = 0.074  # across the fingers, which open 0.08 m
_RIM_M = 0.005  # from the outermost point of a rim to the middle of its wall
_DEPTH_M, _RIM_DEPTH_M = 0.035, 0.025  # of the tips' middle below the thing's top
_LOWEST_M = 0.012  # of the tips' middle above what the thing stands on
_HOVER_M = 0.05  # of the tips' middle above the thing's top
_CLEAR_M = 0.03  # below what is carried
_NEAR_M = 0.007  # from above the grasp: then down
_OFF_M = 0.02  # beside the grasp, on the way down: then up again
_OVER_M = 0.012  # from above the goal: then down, or open
_YAW_RAD = 0.09
_HITS_A_RAD = 4  # points of the hand inside of other things that outweigh a turn by one radian
_HITS_A_FAILURE = 6
_SPARE_M = 0.006  # around other things
_CLOSING_STEPS, _OPENING_STEPS, _STALL_STEPS = 14, 10, 4
_LOST_STEPS = 4  # without a touch of both fingers, which flickers
_STILL_M = 0.001  # in a control step
_MOVED_M = 0.01  # a thing that lies elsewhere is looked at anew
_COAST_STEPS = np.array([2.5, 2.0, 1.5])  # for which x, y, z go on when they are no longer commanded, about
_YAWS = np.deg2rad([0, 30, -30, 60, -60, 90])
_SIGNS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)
# The open hand: fingers and palm, (N, 3) m from the tips' middle; it opens along y.
_FINGERS = [(x, y, z) for x in (-0.01, 0, 0.01) for y in (-0.06, -0.05, 0.05, 0.06) for z in (-0.018, 0, 0.02, 0.04)]
_PALM = [(x, y, z) for x in (-0.03, 0, 0.03) for y in np.linspace(-0.1, 0.1, 9) for z in (0.06, 0.1)]
_HAND = np.array(_FINGERS + _PALM)


class Grasp(NamedTuple):
    """position: (3,) m of the tips' middle, from the thing's own place. yaw: of the hand, rad."""

    position: np.ndarray
    yaw: float


@dataclass(frozen=True)
class Aim:
    """position: (3,) m of the tips' middle, world. yaw: rad. is_shut: the gripper."""

    position: np.ndarray
    yaw: float
    is_shut: bool


class PickOracle:
    """One episode at a time: `reset`, then `speak` whenever a phrase is due and `follow` after every control step."""

    def __init__(
        self, model: mujoco.MjModel, data: mujoco.MjData, hand: int, thing: int, goal: int, drop_m: float | None
    ):
        """hand: site between the finger tips. thing, goal: bodies.

        drop_m: height above the goal's place from which the thing is dropped; None sets it down until they touch.
        """
        self._model, self._data = model, data
        self._hand, self._thing, self._goal = hand, thing, goal
        self._drop_m = drop_m
        self._own, self._goal_geoms = _list_geoms(model, thing), _list_geoms(model, goal)
        robot = _list_geoms(model, model.site_bodyid[hand])
        solid = np.flatnonzero((model.geom_contype > 0) & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX))
        self._others = np.setdiff1d(solid, np.concatenate([self._own, robot]))
        names = [model.geom(geom).name for geom in robot]
        self._fingers = [robot[[f"finger{number}" in name for name in names]] for number in (1, 2)]

    def reset(self, step_m: float, step_rad: float) -> None:
        """An episode begins. step_m, step_rad: what a phrase moves and turns while it is kept."""
        self._step_m, self._step_rad = step_m, step_rad
        self._start_z = self._place[2]
        self._last, self._speed, self._yaw_goal = self._place, np.zeros(3), self._yaw
        self._shut_steps = self._stalled_steps = self._lost_steps = 0
        self._open_steps = _OPENING_STEPS
        self._is_shut = self._is_low = False
        self._shut_at = self._place
        self._failed: dict[int, int] = {}  # grasps that held nothing
        self._look()

    def follow(self, is_shut: bool, yaw_goal: float) -> None:
        """A control step was carried out. is_shut: as the gripper was told. yaw_goal: where the hand turns to, rad."""
        self._shut_steps, self._open_steps = (self._shut_steps + 1, 0) if is_shut else (0, self._open_steps + 1)
        if is_shut and not self._is_shut:
            self._shut_at = self._last
        if self._is_shut and not is_shut and self._lost_steps:
            self._failed[self._choice] = self._failed.get(self._choice, 0) + 1
            self._look()
        self._lost_steps = 0 if not is_shut or self._is_held() else self._lost_steps + 1
        self._is_shut = is_shut
        speed = self._place - self._last
        self._stalled_steps = self._stalled_steps + 1 if self._is_low and abs(speed[2]) < _STILL_M else 0
        self._speed, self._last, self._yaw_goal = speed, self._place, yaw_goal
        self._is_low = self._open_steps >= _OPENING_STEPS and self._decide_low()
        if not is_shut and np.linalg.norm(self._data.xpos[self._thing] - self._seen) > _MOVED_M:
            self._look()

    def speak(self) -> tuple[Primitive, bool]:
        """Signs of what is missing, and whether the gripper is to be shut."""
        aim = self.aim()
        missing = self.measure(aim)
        x, y, z, yaw = (np.sign(missing) * (np.abs(missing) > self._sizes / 2)).astype(int).tolist()
        return Primitive(x, y, z, 0, yaw), aim.is_shut

    def measure(self, aim: Aim) -> np.ndarray:
        """float64 (4,): x, y, z (m), yaw (rad) to go, less what goes on by itself."""
        missing = aim.position - self._place - self._speed * _COAST_STEPS
        return np.append(missing, _wrap(aim.yaw - self._yaw_goal))

    def aim(self) -> Aim:
        if self._is_shut:
            return self._aim_closed()
        if self._open_steps < _OPENING_STEPS:
            return self._stay_open()
        grasp = self._data.xpos[self._thing] + self._grasp.position
        is_done = self._is_low and (self._place[2] - grasp[2] < self._step_m / 2 or self._stalled_steps >= _STALL_STEPS)
        if self._is_low:
            return Aim(grasp, self._grasp.yaw, is_done)
        hover = max(self._start_z, self._top + _HOVER_M)
        if self._place[2] < self._top + _CLEAR_M:  # straight up, lest it drags the thing along
            return Aim(np.array([*self._place[:2], hover]), self._yaw_goal, False)
        return Aim(np.array([*grasp[:2], hover]), self._grasp.yaw, False)

    def _stay_open(self) -> Aim:
        return Aim(self._place, self._yaw_goal, False)

    def _aim_closed(self) -> Aim:
        if self._shut_steps < _CLOSING_STEPS:
            height = self._data.xpos[self._thing][2] + self._grasp.position[2]
            return Aim(np.array([*self._shut_at[:2], height]), self._yaw_goal, True)
        if self._lost_steps >= _LOST_STEPS:
            return self._stay_open()
        thing, goal = self._data.xpos[self._thing], self._data.xpos[self._goal]
        to_goal = goal - thing
        is_over = np.abs(to_goal[:2]).max() < _OVER_M
        bottom = thing[2] - self._below
        clear = self._find_height() + _CLEAR_M
        rise = clear - bottom
        if is_over:
            if self._drop_m is not None or self._touches(self._goal_geoms, self._own):
                return self._stay_open()
            return Aim(self._place + np.append(to_goal[:2], -1.0), self._yaw_goal, True)
        sideways = to_goal[:2] if rise < _CLEAR_M / 2 else np.zeros(2)
        return Aim(self._place + np.append(sideways, rise), self._yaw_goal, True)

    def _decide_low(self) -> bool:
        """Whether the hand is above the grasp, or on its way down and not far off."""
        grasp = self._data.xpos[self._thing] + self._grasp.position
        missing = np.abs(self.measure(Aim(grasp, self._grasp.yaw, False)))
        near_m = max(_NEAR_M, self._step_m / 2)
        limit_m = max(_OFF_M, near_m) if self._is_low else near_m
        return bool(missing[:2].max() <= limit_m and missing[3] <= max(_YAW_RAD, self._step_rad / 2))

    def _is_held(self) -> bool:
        """Whether both fingers touch the thing."""
        return all(self._touches(geoms, self._own) for geoms in self._fingers)

    def _touches(self, some: np.ndarray, others: np.ndarray) -> bool:
        pairs = self._data.contact.geom[: self._data.ncon]
        first = np.isin(pairs, some)
        return bool((first & np.isin(pairs[:, ::-1], others)).any())

    def _find_height(self) -> float:
        """Of the highest thing on the straight way to the goal, m."""
        start, end = self._data.xpos[self._thing][:2], self._data.xpos[self._goal][:2]
        places, way = self._data.geom_xpos[self._others], end - start
        share = np.clip((places[:, :2] - start) @ way / max(way @ way, 1e-9), 0, 1)
        beside = np.linalg.norm(places[:, :2] - start - share[:, None] * way, axis=1)
        is_near = beside < self._model.geom_rbound[self._others] + _CLEAR_M
        tops = places[:, 2] + self._measure_extent(self._others)[:, 2]
        return float(tops[is_near].max(initial=-np.inf))

    def _measure_extent(self, geoms: np.ndarray) -> np.ndarray:
        """Half sizes (N, 3) of boxes along the world's axes, m."""
        turned = np.abs(self._data.geom_xmat[geoms].reshape(-1, 3, 3))
        return np.einsum("nij,nj->ni", turned, self._model.geom_size[geoms])

    def _look(self) -> None:
        """Choose the grasp of the thing as it lies now."""
        place = self._seen = self._data.xpos[self._thing].copy()
        corners = self._list_corners() - place
        top, self._below = corners[:, 2].max(), -corners[:, 2].min()
        self._top = place[2] + top
        fits = [grasp for yaw in _YAWS for grasp in self._fit_whole(corners, top, yaw)]
        grasps = fits or [grasp for yaw in _YAWS for grasp in self._take_rim(corners, top, yaw)]
        costs = [
            self._count_hits(place, grasp) + _HITS_A_RAD * abs(grasp.yaw) + _HITS_A_FAILURE * self._failed.get(index, 0)
            for index, grasp in enumerate(grasps)
        ]
        self._choice = int(np.argmin(costs))
        self._grasp = grasps[self._choice]

    def _list_corners(self) -> np.ndarray:
        """(N, 3) m, of the thing's boxes, world."""
        turned, sizes = self._data.geom_xmat[self._own].reshape(-1, 3, 3), self._model.geom_size[self._own]
        offsets = np.einsum("nij,cnj->cni", turned, _SIGNS[:, None] * sizes)
        return (self._data.geom_xpos[self._own] + offsets).reshape(-1, 3)

    def _fit_whole(self, corners: np.ndarray, top: float, yaw: float) -> list[Grasp]:
        """Across the whole thing, where it fits between the fingers. corners: (N, 3) m, from its place."""
        axes = _turn(yaw)
        low, high = (corners @ axes.T).min(axis=0), (corners @ axes.T).max(axis=0)
        if high[1] - low[1] > _WIDEST_M:
            return []
        height = max(top - _DEPTH_M, min(0.0, top - _DEPTH_M / 2), _LOWEST_M - self._below)
        return [Grasp(np.append(((low + high) / 2 @ axes)[:2], height), yaw)]

    def _take_rim(self, corners: np.ndarray, top: float, yaw: float) -> list[Grasp]:
        """Across its wall, on either side."""
        across = _turn(yaw)[1]
        extent = corners @ across
        height = max(top - _RIM_DEPTH_M, _LOWEST_M - self._below)
        sides = (extent.max() - _RIM_M, extent.min() + _RIM_M)
        return [Grasp(np.append((side * across)[:2], height), yaw) for side in sides]

    def _count_hits(self, place: np.ndarray, grasp: Grasp) -> int:
        """Points of the open hand that would be inside of other things."""
        points = _HAND @ _turn(grasp.yaw) + place + grasp.position
        turned = self._data.geom_xmat[self._others].reshape(-1, 3, 3)
        inside = np.einsum("npi,nij->npj", points - self._data.geom_xpos[self._others][:, None], turned)
        return int(
            (np.abs(inside) <= self._model.geom_size[self._others][:, None] + _SPARE_M).all(axis=2).any(axis=0).sum()
        )

    @property
    def _place(self) -> np.ndarray:
        return self._data.site_xpos[self._hand].copy()

    @property
    def _yaw(self) -> float:
        return measure_yaw(self._data.site_xmat[self._hand].reshape(3, 3))

    @property
    def _sizes(self) -> np.ndarray:
        return np.array([self._step_m] * 3 + [self._step_rad])


def measure_yaw(rotation: np.ndarray) -> float:
    """Of the site between the tips, (3, 3), whose x axis is the one along which fingers open: rad."""
    return float(np.arctan2(-rotation[0, 0], rotation[1, 0]))


def _list_geoms(model: mujoco.MjModel, body: int) -> np.ndarray:
    """Solid geoms of a body and of all that hangs on its root."""
    return np.flatnonzero(
        (model.body_rootid[model.geom_bodyid] == model.body_rootid[body]) & (model.geom_conaffinity > 0)
    )


def _turn(yaw: float) -> np.ndarray:
    """(3, 3): rows are the hand's axes in the world; fingers open along the second."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])


def _wrap(angle: float) -> float:
    """Into -pi/2..pi/2: a hand that is turned by half a turn grasps the same."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2
