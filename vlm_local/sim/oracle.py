"""The phrase oracle: what to say in any state, from ground truth, in steps of the server's own table.

    oracle = Oracle(env)
    oracle.primitive()    # Primitive for the state the environment is in now
    Oracle(env, table)    # reckons with other steps than the server's own

It is a function of the state alone, and of what the cue of a memory task showed, so it also labels
states that it would never visit (DAgger, Ross et al., 2011). An axis moves while it is off by more
than a little over half a step, so that a step never overshoots into the opposite word.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from vlm_local.actions import StepTable
from vlm_local.sim.block_tasks import REACH_HEIGHT_M, Lift, Push, Reach, ReachRelation, is_ready_to_push
from vlm_local.sim.drawer_tasks import CloseDrawer, OpenDrawer, is_before_bar, is_behind_bar, measure_tips
from vlm_local.sim.furniture import BLOCK_HALF_M, HANDLE_GAP_OUT_M, HANDLE_HEIGHT_M, HANDLE_OUT_M
from vlm_local.sim.memory_tasks import PutBack, ReachShown
from vlm_local.sim.sink_tasks import EggplantTask, EggplantToBasket, EggplantToSink, is_held
from vlm_local.sim.task import Task
from vlm_local.sim.world import World
from vlm_local.types import Primitive

_NEAR, _NEAR_TURN = 0.6, 0.65  # of a step: less is not worth moving for
_BELOW_M = 0.02  # this far below its path the gripper only goes up
_SHUT, _WIDE = 0.15, 0.8  # openings that count as closed and as open
_AT_M = 0.0105  # per axis: the fingers are around the thing
_ASKEW_RAD = 0.3  # fingers this far from straight across a thing still grip it
_FINGERS_M, _FINGER_M = 0.052, 0.010  # reach of the open fingers from the middle; half a finger's width
_INSIDE_M = 0.045  # from the walls of what a thing is dropped into
_RIM_M = 0.09  # closer than this to the place of release there may be a rim below
_CARRY_M = 0.088
_RELEASE_M = 0.055
# Here the task is done and nothing is left to do. So far beyond a success that who sees it less well, by a
# centimetre, does not stop before it. A drawer that is nearly closed cannot be told from one that is: it is pushed.
_OPEN_M = 0.085  # how far the drawer is out
_LIFTED_M = 0.065
_AWAY_M = 0.13  # the tips' height above the table, once the eggplant lies where it shall


class Near(NamedTuple):
    """Within this an axis rests: across (x and y) and up, m; tilt and yaw, rad."""

    across: float
    up: float
    tilt: float
    yaw: float


class Situation(Protocol):
    """What the oracle looks at: a SimEnv, or any other object with a task and the world it is about."""

    task: Any
    world: World


class Oracle:
    """Answers for the episode that the environment is in. table: the steps it reckons with."""

    def __init__(self, env: Situation, table: StepTable = StepTable()):
        self._env = env
        across = _NEAR * max(table.x_m, table.y_m)
        self._near = Near(across, _NEAR * table.z_m, _NEAR_TURN * table.tilt_rad, _NEAR_TURN * table.yaw_rad)

    def primitive(self) -> Primitive:
        task = self._env.task
        return _PLANS[type(task)](task, self._env.world, self._near)


def _sign(error: float, near: float) -> int:
    return int(error > near) - int(error < -near)


def _steer(world: World, near: Near, goal: np.ndarray, yaw: float = 0.0, gripper: int = 0) -> Primitive:
    """Signs towards a goal (3,) m with the gripper pointing down at this heading."""
    x, y, z = map(_sign, goal - world.tips, (near.across, near.across, near.up))
    _, _, _, _, pitch, heading, _ = world.proprio
    return Primitive(x, y, z, _sign(-pitch, near.tilt), _sign(yaw - heading, near.yaw), gripper)


def _approach(world: World, near: Near, goal: np.ndarray, hover: float, slope: float, **turn) -> Primitive:
    """Travel `hover` above the goal, come down a funnel around it; well below the funnel only go up."""
    aside = np.abs(goal[:2] - world.tips[:2]).max()
    raised = goal + np.array([0, 0, np.clip(slope * (aside - 1.4 * near.across), 0, hover)])
    if raised[2] - world.tips[2] > _BELOW_M:
        raised[:2] = world.tips[:2]
    return _steer(world, near, raised, **turn)


def _nearest(world: World, centre: np.ndarray, heading: float, room: tuple[float, float]) -> np.ndarray:
    """The point nearest to the tips of a rectangle, half size `room` (along, across) m, at centre (3,) m.

    Where exactly is all the same there, so nothing more precise is asked for.
    """
    turn = np.array([[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]])
    offset = np.clip(turn.T @ (world.tips[:2] - centre[:2]), np.negative(room), room)
    return np.append(centre[:2] + turn @ offset, centre[2])


def _plan_reach(task: Reach, world: World, near: Near) -> Primitive:
    block = world.place(f"block{task.target}")
    return _approach(world, near, np.array([block[0], block[1], REACH_HEIGHT_M]), hover=0.05, slope=1)


def _plan_lift(task: Lift, world: World, near: Near) -> Primitive:
    block = f"block{task.target}"
    if world.count_pads(block) == 2:
        up = 0.05 if world.place(block)[2] < BLOCK_HALF_M + _LIFTED_M else 0
        return _steer(world, near, world.tips + np.array([0, 0, up]), yaw=world.proprio[5])
    return _grasp(world, near, block, np.pi / 2, room=(0.004, 0.004))


def _plan_push(task: Push, world: World, near: Near) -> Primitive:
    block = world.place(f"block{task.target}")
    gripper = -1 if world.opening > _SHUT else 0
    height = BLOCK_HALF_M + 0.004
    if is_ready_to_push(world, f"block{task.target}", task.way):
        ahead = np.where(task.way, world.tips[:2] + 0.03 * task.way, block[:2])
        return _steer(world, near, np.append(ahead, height), gripper=gripper)
    start = np.append(block[:2] - 0.052 * task.way, height + (0.05 if gripper else 0))
    start = _nearest(world, start, np.pi / 2, room=(0.007, 0.003))
    return _approach(world, near, start, hover=0.05, slope=4, gripper=gripper)


def _plan_drawer(
    world: World, near: Near, middle_m: float, room: tuple[float, float], push_m: float, is_there
) -> Primitive:
    """Lower the closed gripper within `room` of `middle_m` on the drawer's x axis, then move by `push_m`."""
    tips, height = measure_tips(world), HANDLE_HEIGHT_M - 0.018
    gripper = -1 if world.opening > _SHUT else 0
    if is_there(tips):
        across = np.clip(tips[1], -room[1], room[1])
        return _steer(world, near, world.locate("drawer", (tips[0] + push_m, across, height)), gripper=gripper)
    goal = world.locate("drawer", (middle_m, 0, height + (0.05 if gripper else 0)))
    goal = _nearest(world, goal, world.yaw("drawer"), room)
    return _approach(world, near, goal, hover=0.05, slope=5, gripper=gripper)


def _plan_open(task: OpenDrawer, world: World, near: Near) -> Primitive:
    if world.slide("drawer") > _OPEN_M:
        return Primitive()
    return _plan_drawer(world, near, -HANDLE_GAP_OUT_M, (0.006, 0.018), -0.03, is_behind_bar)


def _plan_close(task: CloseDrawer, world: World, near: Near) -> Primitive:
    return _plan_drawer(world, near, -HANDLE_OUT_M - 0.036, (0.008, 0.018), 0.03, is_before_bar)


def _plan_eggplant(task: EggplantTask, world: World, near: Near) -> Primitive:
    if task.is_inside(world):
        narrow = world.opening < _WIDE
        up = 0.05 if not narrow and world.tips[2] < _AWAY_M else 0
        goal = world.tips + np.array([0, 0, up])
        return _steer(world, near, goal, yaw=world.proprio[5], gripper=int(narrow))
    if is_held(world):
        return _carry(task, world, near)
    return _grasp(world, near, "eggplant", np.pi, room=(0.010, 0.006), area=task.find_container(world))


def _carry(task: EggplantTask, world: World, near: Near) -> Primitive:
    """Up and across above the rims, to where it falls well into the goal; a little down, open."""
    room = np.array(task.goal_half) - _INSIDE_M
    goal = np.append(np.clip(world.tips[:2], task.goal_centre - room, task.goal_centre + room), 0.0)
    aside = np.abs(goal[:2] - world.tips[:2]).max()
    yaw = world.proprio[5]
    if aside < near.across:
        goal[2] = task.goal_floor_m + _RELEASE_M
        if world.tips[2] < goal[2] + near.up:
            return _steer(world, near, world.tips, yaw=yaw, gripper=1)
        return _steer(world, near, goal, yaw=yaw)
    goal[2] = _CARRY_M
    if world.tips[2] < _CARRY_M - near.up - max(0, aside - _RIM_M):
        goal[:2] = world.tips[:2]
    return _steer(world, near, goal, yaw=yaw)


def _grasp(world: World, near: Near, thing: str, symmetry: float, room: tuple[float, float], area=None) -> Primitive:
    """Open, come down across the thing, close.

    symmetry: the thing looks alike after this turn, rad. room: how far off the middle it is still
    gripped well, (along, across) m. area: centre and half size (2,) m to stay in.
    """
    heading = world.proprio[5]
    turn = (world.yaw(thing) - heading + symmetry / 2) % symmetry - symmetry / 2
    yaw = heading + turn if abs(turn) > _ASKEW_RAD else heading
    goal = _nearest(world, world.place(thing), world.yaw(thing), room)
    if area is not None:
        free = np.maximum(area[1] - _FINGERS_M * np.abs([np.sin(heading), np.cos(heading)]) - _FINGER_M, 0)
        goal[:2] = np.clip(goal[:2], area[0] - free, area[0] + free)
    if np.abs(goal - world.tips).max() < _AT_M and yaw == heading:
        return _steer(world, near, world.tips, yaw=yaw, gripper=-1)
    narrow = world.opening < _WIDE
    if narrow or yaw != heading:
        goal[2] += 0.05  # not yet down
    return _approach(world, near, goal, hover=0.08, slope=2, yaw=yaw, gripper=int(narrow))


_PLANS: dict[type[Task], Callable[..., Primitive]] = {
    Reach: _plan_reach,
    ReachRelation: _plan_reach,
    Lift: _plan_lift,
    Push: _plan_push,
    OpenDrawer: _plan_open,
    CloseDrawer: _plan_close,
    EggplantToBasket: _plan_eggplant,
    EggplantToSink: _plan_eggplant,
    ReachShown: _plan_reach,
    PutBack: _plan_push,
}
