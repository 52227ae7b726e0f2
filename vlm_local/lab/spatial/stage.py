"""Scene -> picture, proprio and the right answer, by the simulator and its oracle."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlm_local.lab.spatial.changes import EMPTIES, Change
from vlm_local.lab.spatial.scenes import Scene
from vlm_local.sim import scene as room
from vlm_local.sim.block_tasks import COLOURS, Reach
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.furniture import BLOCK_HALF_M
from vlm_local.sim.levels import Level, vary_light, vary_surfaces, vary_surroundings
from vlm_local.sim.oracle import Oracle
from vlm_local.sim.rendering import Camera
from vlm_local.sim.world import World
from vlm_local.types import Observation, Primitive

IMAGE_SIZE = 256
_DISTRACTOR_RGB = ((0.85, 0.85, 0.83), (0.25, 0.25, 0.27))
_ARM_RGB = ((0.80, 0.80, 0.82), (0.45, 0.30, 0.16), (0.20, 0.30, 0.36))


@dataclass(frozen=True, eq=False)
class View:
    """A changed scene as a policy sees it, and the truth about it.

    signs: the oracle's, None where no answer is right. ways: the oracle's for each block's colour.
    """

    change: Change
    scene: Scene
    observation: Observation
    signs: Primitive | None
    ways: Mapping[str, Primitive]


class Stage:
    """Draws the scenes of one level. drawn: False needs no OpenGL and gives images (0, 0, 3)."""

    def __init__(self, level: Level, drawn: bool = True):
        self._level, self._drawn = level, drawn
        self.world, self.task = World("blocks"), Reach()
        self._camera: Camera | None = None
        self._drawer: np.ndarray | None = None

    def show(self, original: Scene, change: Change) -> View:
        scene = change.apply(original)
        self._build(scene)
        ways = {}
        for self.task.target, (colour, _) in enumerate(scene.blocks):
            ways[colour] = Oracle(self).primitive()
        signs = None if change.rule == EMPTIES else ways[scene.named]
        observation = Observation(self._draw(change.image), scene.instruction, self.world.proprio.copy())
        return View(change, scene, observation, signs, ways)

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()

    def _build(self, scene: Scene) -> None:
        world, model = self.world, self.world.model
        world.clear()
        vary_surroundings(model, self._level, np.random.default_rng(scene.surroundings))
        self._vary(scene)
        for index, (colour, place) in enumerate(scene.blocks):
            world.put(f"block{index}", (*place, BLOCK_HALF_M))
            world.paint(f"block{index}", COLOURS[colour])
        for index, place in enumerate(scene.distractors):
            world.put(f"distractor{index}", (*place, 0.025))
            world.paint(f"distractor{index}", _DISTRACTOR_RGB[index])
        world.put_arm(np.array(scene.tips))

    def _vary(self, scene: Scene) -> None:
        """What a change draws anew, as strongly as the hardest level does."""
        model, strong = self.world.model, Level("changed", light=1.0, camera=1.0)
        if scene.table is not None:
            vary_surfaces(model, strong, np.random.default_rng([scene.table, 1]))
        if scene.light is not None:
            vary_light(model, strong, np.random.default_rng([scene.light, 2]))
        if scene.camera is not None:
            rng, camera = np.random.default_rng([scene.camera, 3]), model.camera(room.CAMERA).id
            position = model.cam_pos[camera] + 0.03 * rng.uniform(-1, 1, 3)
            target = np.array(room.CAMERA_TARGET) + 0.02 * rng.uniform(-1, 1, 3)
            model.cam_pos[camera], model.cam_quat[camera] = position, room.look_at(position, target)
        black = model.material("trossen_black")
        rng = np.random.default_rng([scene.arm or 0, 4])
        black.rgba[:3] = (0.15, 0.15, 0.165) if scene.arm is None else _ARM_RGB[rng.integers(len(_ARM_RGB))]

    def _draw(self, image: str) -> np.ndarray:
        if not self._drawn:
            return np.zeros((0, 0, 3), np.uint8)
        if image == "blank":
            return np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        if image == "other":
            return self._draw_drawer()
        if self._camera is None:
            self._camera = Camera(self.world.model, room.CAMERA, IMAGE_SIZE)
        return self._camera.render(self.world.data)

    def _draw_drawer(self) -> np.ndarray:
        if self._drawer is None:
            env = SimEnv("open_drawer", self._level.name, IMAGE_SIZE)
            observation, _ = env.reset(seed=0)
            env.close()
            self._drawer = np.asarray(observation["image"])
        return self._drawer
