"""Sets of scenes, named by level, seed and number and frozen by the hash of what they hold; and what draws them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vlm_local.errors import ConfigError
from vlm_local.files import encode_json
from vlm_local.lab.spatial.scenes import CHANGES, EMPTIES, NONE, Change, Scene, sample_scene
from vlm_local.sim import scene as room
from vlm_local.sim.block_tasks import COLOURS, Reach
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.furniture import BLOCK_HALF_M
from vlm_local.sim.levels import Level, find_level, vary_camera, vary_light, vary_surfaces, vary_surroundings
from vlm_local.sim.oracle import Oracle
from vlm_local.sim.rendering import Camera
from vlm_local.sim.world import World
from vlm_local.types import Observation, Primitive

IMAGE_SIZE = 256  # px
_DISTRACTOR_RGB = ((0.85, 0.85, 0.83), (0.25, 0.25, 0.27))
_ARM_RGB = ((0.80, 0.80, 0.82), (0.45, 0.30, 0.16), (0.20, 0.30, 0.36))


@dataclass(frozen=True)
class SceneSet:
    """scenes_sha256: of all instructions, places and right answers; images_sha256: of all pixels.

    None for a set that was never drawn.
    """

    level: str
    seed: int
    scenes: int
    scenes_sha256: str | None = None
    images_sha256: str | None = None

    def __post_init__(self):
        find_level(self.level)
        if not (isinstance(self.scenes, int) and isinstance(self.seed, int) and self.scenes >= 2 and self.seed >= 0):
            raise ConfigError(f"a set has 2 scenes or more and a seed of 0 or more, not {self}")


def load_set(path: Path) -> SceneSet:
    """A file as in docs/spatial/."""
    try:
        return SceneSet(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no set of scenes such as those in docs/spatial/ ({error})") from None


@dataclass(frozen=True, eq=False)
class View:
    """A changed scene as a policy sees it, and the right answer.

    signs: of the oracle, None where no answer is right. ways: the oracle's signs if the block of that colour was named.
    """

    change: Change
    scene: Scene
    observation: Observation
    signs: Primitive | None
    ways: Mapping[str, Primitive]


class Gallery:
    """Shows every scene of a set, as it is and under every change, and freezes what it showed.

    drawn: False needs no OpenGL and gives images (0, 0, 3), else (256, 256, 3), uint8.
    """

    def __init__(self, scene_set: SceneSet, drawn: bool = True):
        self._set, self._drawn = scene_set, drawn
        self._level = find_level(scene_set.level)
        self.world, self.task = World("blocks"), Reach()  # which the oracle looks at
        self._camera: Camera | None = None
        self._drawer: np.ndarray | None = None

    def show_all(self) -> Iterator[tuple[int, View]]:
        """(index of the scene, view), each scene's first as it is; ends with `frozen` filled in."""
        scenes, images = hashlib.sha256(), hashlib.sha256()
        for index in range(self._set.scenes):
            for name in (NONE.name, *CHANGES):
                view = self.show(index, name)
                told = [index, name, view.scene.instruction, view.signs, asdict(view.scene)]
                scenes.update(encode_json(told).encode())
                images.update(view.observation.image.tobytes())
                yield index, view
        images_sha256 = images.hexdigest() if self._drawn else self._set.images_sha256
        self.frozen = replace(self._set, scenes_sha256=scenes.hexdigest(), images_sha256=images_sha256)

    def show(self, index: int, name: str) -> View:
        """Scene `index` under the change of this name; a name that is no change leaves it as it is."""
        change = CHANGES.get(name, NONE)
        scene = change.apply(sample_scene(self._level, self._set.seed, index))
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
            vary_camera(model, strong, np.random.default_rng([scene.camera, 3]), model.camera(room.CAMERA).pos)
        if scene.arm is not None:
            rng = np.random.default_rng([scene.arm, 4])
            model.material(room.ARM_MATERIAL).rgba[:3] = _ARM_RGB[rng.integers(len(_ARM_RGB))]

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


def require_frozen(wanted: SceneSet, found: SceneSet, refuse: Callable[[str], Exception] = ConfigError) -> None:
    """Raises where a frozen set came out otherwise: its scores would not be comparable with others'."""
    if wanted.scenes_sha256 not in (None, found.scenes_sha256):
        raise refuse(
            f"the scenes of this set come out as {found.scenes_sha256} and were frozen as {wanted.scenes_sha256}: "
            "this version of the simulator has other scenes; use the version that froze them"
        )
    if wanted.images_sha256 not in (None, found.images_sha256):
        raise refuse(
            f"the pictures of this set come out as {found.images_sha256} and were frozen as {wanted.images_sha256}: "
            "they are drawn otherwise here (another Mesa, MuJoCo or GPU); without --set the same scenes can be "
            "measured, as a set of this machine"
        )
