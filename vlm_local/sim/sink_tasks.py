"""Move the toy eggplant between the sink and the dish rack, in AutoEval's words."""

import numpy as np

from vlm_local.sim.furniture import (
    BASIN_CENTRE,
    BASIN_FLOOR_M,
    BASIN_HALF,
    BASKET_CENTRE,
    BASKET_FLOOR_M,
    BASKET_HALF,
    BASKET_RIM_M,
    COUNTER_M,
    EGGPLANT_RADIUS_M,
    SLOPE_M,
)
from vlm_local.sim.task import Task, combine, sample_start
from vlm_local.sim.world import World

_MOVING = ("put", "move", "place", "bring", "carry", "lay")

# Centre and half size (2,) m of where a gripper can go down, and the top of it.
_CONTAINERS = (
    (np.array(BASIN_CENTRE), np.array(BASIN_HALF) - 0.018, COUNTER_M),
    (np.array(BASKET_CENTRE), np.array(BASKET_HALF) - 0.003, BASKET_RIM_M),
)

_REACHED_M = 0.03
_LIFTED_M = 0.03  # above where it lay
_TURN_RAD = 0.5  # at most, from pointing forward


def is_held(world: World) -> bool:
    """Both finger pads press on the eggplant."""
    return world.count_pads("eggplant") == 2


class EggplantTask(Task):
    """goal_centre, goal_half: (2,) m; goal_top_m: below this it lies inside."""

    kind = "sink"
    stages = ("reached", "grasped", "lifted", "placed")
    goal_centre: tuple[float, float]
    goal_half: tuple[float, float]
    goal_floor_m: float
    goal_top_m: float

    def sample_eggplant(self, world, level, rng, centre, half, floor_m: float) -> None:
        """Lay it on that floor within `half` (2,) m of `centre` (2,) m."""
        x, y = np.array(centre) + level.spread * np.array(half) * rng.uniform(-1, 1, 2)
        self._start_m = floor_m + EGGPLANT_RADIUS_M
        world.put("eggplant", (x, y, self._start_m + 0.001), yaw=level.spread * _TURN_RAD * rng.uniform(-1, 1))
        world.put_arm(sample_start(level, rng) + np.array([0, 0, 0.02]))
        self.phrase_instruction(level, rng)

    def is_inside(self, world: World) -> bool:
        x, y, z = world.place("eggplant")
        offset = np.abs(np.array([x, y]) - self.goal_centre)
        return bool((offset < self.goal_half).all() and z < self.goal_top_m)

    def find_container(self, world: World) -> tuple[np.ndarray, np.ndarray] | None:
        """Centre and half size (2,) m of what the eggplant lies in."""
        x, y, z = world.place("eggplant")
        for centre, half, top in _CONTAINERS:
            if (np.abs(np.array([x, y]) - centre) < half).all() and z < top:
                return centre, half
        return None

    def is_done(self, world):
        return self.is_inside(world) and world.count_pads("eggplant") == 0 and world.speed("eggplant") < 0.05

    def count_stages(self, world):
        if self.is_done(world):
            return 4
        place = world.place("eggplant")
        if is_held(world):
            return 3 if place[2] > self._start_m + _LIFTED_M else 2
        return int(np.linalg.norm(place - world.tips) < _REACHED_M)


class EggplantToBasket(EggplantTask):
    name = "eggplant_in_basket"
    wrong_words = "put the eggplant in the blue sink"
    words = combine(_MOVING, ("the eggplant",), ("in", "to", "into"), ("the yellow basket", "the basket"))
    unseen = ("drop the eggplant into the basket", "the eggplant belongs in the yellow rack")
    goal_centre, goal_half = BASKET_CENTRE, BASKET_HALF
    goal_floor_m, goal_top_m = BASKET_FLOOR_M, BASKET_RIM_M

    def sample(self, world, level, rng):
        half = np.array(BASIN_HALF) - SLOPE_M - (0.045, 0.03)
        self.sample_eggplant(world, level, rng, BASIN_CENTRE, half, BASIN_FLOOR_M)


class EggplantToSink(EggplantTask):
    name = "eggplant_in_sink"
    wrong_words = "put the eggplant in the yellow basket"
    words = combine(_MOVING, ("the eggplant",), ("in", "to", "into"), ("the blue sink", "the sink"))
    unseen = ("drop the eggplant into the sink", "the eggplant belongs in the blue basin")
    goal_centre, goal_half = BASIN_CENTRE, BASIN_HALF
    goal_floor_m, goal_top_m = BASIN_FLOOR_M, COUNTER_M

    def sample(self, world, level, rng):
        self.sample_eggplant(world, level, rng, BASKET_CENTRE, (0.025, 0.012), BASKET_FLOOR_M)
