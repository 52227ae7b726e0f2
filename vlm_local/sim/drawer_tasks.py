"""Open and close the toy drawer."""

import numpy as np

from vlm_local.sim.furniture import DRAWER_TRAVEL_M, HANDLE_GAP_OUT_M, HANDLE_HEIGHT_M, HANDLE_OUT_M
from vlm_local.sim.task import Task, combine, sample_start
from vlm_local.sim.world import World

_OPEN_M = 0.065
_CLOSED_M = 0.012
_HALF_WIDTH_M = 0.035  # of the bar between its posts, less a finger


def measure_tips(world: World) -> np.ndarray:
    """(3,) m: the finger tips in the drawer's frame, -x the way out, z up from the table."""
    return world.find("drawer", world.tips)


def is_behind_bar(tips: np.ndarray) -> bool:
    """tips: of `measure_tips`. Lowered into the gap between bar and front."""
    x, y, z = tips
    return abs(x + HANDLE_GAP_OUT_M) < 0.026 and abs(y) < _HALF_WIDTH_M and z < HANDLE_HEIGHT_M - 0.004


def is_before_bar(tips: np.ndarray) -> bool:
    """tips: of `measure_tips`. Lowered outside the bar, within pushing distance."""
    x, y, z = tips
    return -0.055 < x + HANDLE_OUT_M < -0.006 and abs(y) < _HALF_WIDTH_M and z < HANDLE_HEIGHT_M + 0.004


class DrawerTask(Task):
    """The cabinet stands left behind the middle and turned towards the robot's right."""

    kind = "drawer"

    def sample_drawer(self, world, level, rng, slide: float) -> None:
        """slide: how far the drawer is out, m."""
        middle, limits = np.array([0.390, 0.130, np.radians(42)]), (0.015, 0.02, 0.2)
        x, y, turn = middle + level.spread * rng.uniform(-1, 1, 3) * limits
        world.move("cabinet", (x, y, 0), yaw=turn)
        world.set_slide("drawer", slide)
        world.put_arm(sample_start(level, rng) + np.array([-0.02, -0.05, 0.01]))


class OpenDrawer(DrawerTask):
    name = "open_drawer"
    stages = ("reached", "opened")
    wrong_words = "close the drawer"
    words = (
        *combine(("open", "open up"), ("the drawer", "the drawer of the cabinet")),
        *combine(("pull", "slide", "draw", "move"), ("the drawer",), ("open", "out")),
    )
    unseen = ("the drawer should be open", "pull out the red drawer", "get the drawer open, please")

    def sample(self, world, level, rng):
        self.sample_drawer(world, level, rng, slide=0.01 * rng.random())
        self.phrase_instruction(level, rng)

    def is_done(self, world):
        return world.slide("drawer") > _OPEN_M

    def count_stages(self, world):
        return 2 if self.is_done(world) else int(is_behind_bar(measure_tips(world)))


class CloseDrawer(DrawerTask):
    name = "close_drawer"
    stages = ("reached", "closed")
    wrong_words = "open the drawer"
    words = (
        *combine(("close", "close up"), ("the drawer", "the drawer of the cabinet")),
        *combine(("push", "slide", "press", "move"), ("the drawer",), ("shut", "closed", "in")),
    )
    unseen = ("the drawer should be closed", "push in the red drawer", "shut the drawer, please")

    def sample(self, world, level, rng):
        self.sample_drawer(world, level, rng, slide=DRAWER_TRAVEL_M * (1 - 0.3 * rng.random()))
        self.phrase_instruction(level, rng)

    def is_done(self, world):
        return world.slide("drawer") < _CLOSED_M

    def count_stages(self, world):
        return 2 if self.is_done(world) else int(is_before_bar(measure_tips(world)))
