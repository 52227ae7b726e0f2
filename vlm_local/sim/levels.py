"""How hard an episode is: named levels of variation, and the drawing of what has no part in the task."""

from dataclasses import dataclass

import mujoco
import numpy as np

from vlm_local.errors import ConfigError, suggest
from vlm_local.sim import scene
from vlm_local.sim.furniture import PARKING_M


@dataclass(frozen=True)
class Level:
    """spread: share of the range of places, 0..1. light, camera: strength of variation, 0..1.

    distractors: most things on the table that no instruction names. more_colours: yellow and purple
    besides red, green and blue. wording: "first" (AutoEval's), "seen" in training, or "unseen".
    coloured_light: a lamp of a colour that no other level has. coloured_arm: half of the arms are of any colour.
    """

    name: str
    spread: float = 1.0
    light: float = 0.5
    camera: float = 0.5
    distractors: int = 1
    more_colours: bool = False
    wording: str = "seen"
    coloured_light: bool = False
    coloured_arm: bool = False


LEVELS = {
    level.name: level
    for level in (
        Level("easy", spread=0.6, light=0.0, camera=0.0, distractors=0, wording="first"),
        Level("normal"),
        Level("hard", light=1.0, camera=1.0, distractors=2, more_colours=True, wording="unseen"),
        # As hard, in words of training.
        Level("varied", light=1.0, camera=1.0, distractors=2, more_colours=True, coloured_arm=True),
        Level("words", wording="unseen"),  # as normal, and every instruction in words that training never had
        Level("light", coloured_light=True),  # as normal, and light of colours that training never had
    )
}


def find_level(name: str) -> Level:
    if name not in LEVELS:
        raise ConfigError(f"level must be one of {', '.join(LEVELS)}, not {name!r}{suggest(name, LEVELS)}")
    return LEVELS[name]


def vary_surroundings(model: mujoco.MjModel, level: Level, rng: np.random.Generator) -> None:
    """Draw table, walls, light, camera, tins and the arm's colour of one episode into the model's fields."""
    vary_surfaces(model, level, rng)
    vary_light(model, level, rng)
    vary_camera(model, level, rng, scene.CAMERA_POSITION)
    model.camera(scene.CAMERA).fovy = scene.CAMERA_FOVY_DEG + 2 * level.camera * rng.uniform(-1, 1)
    coloured = level.coloured_arm and rng.random() < 0.5
    model.material(scene.ARM_MATERIAL).rgba[:3] = rng.uniform(0.05, 0.9, 3) if coloured else scene.ARM_RGB


def vary_camera(model: mujoco.MjModel, level: Level, rng: np.random.Generator, place_m) -> None:
    """place_m: three numbers, from where it is moved."""
    position = np.array(place_m) + 0.03 * level.camera * rng.uniform(-1, 1, 3)
    target = np.array(scene.CAMERA_TARGET) + 0.02 * level.camera * rng.uniform(-1, 1, 3)
    camera = model.camera(scene.CAMERA)
    camera.pos, camera.quat = position, scene.look_at(position, target)


def vary_surfaces(model: mujoco.MjModel, level: Level, rng: np.random.Generator) -> None:
    wood = ("veneer", "planks")[rng.integers(2)] if level.light else "veneer"
    model.geom_matid[model.geom("table").id] = model.material(wood).id
    brightness = 0.88 + 0.3 * level.light * rng.uniform(-1, 1)
    warmth = 1 + 0.12 * level.light * rng.uniform(-1, 1, 3)
    model.geom("table").rgba[:3] = np.clip(brightness * warmth, 0, 1.2)
    paint = np.array([0.86, 0.87, 0.86]) + 0.14 * level.light * rng.uniform(-1, 1, 3)
    for wall in ("wall", "side"):
        model.geom(wall).rgba[:3] = paint
    for index in range(2):
        shown = level.light > 0 and rng.random() < 0.7
        place = (rng.uniform(0.56, 0.68), rng.uniform(-0.32, 0.42), 0.0)
        model.body(f"tin{index}").pos = place if shown else PARKING_M


def vary_light(model: mujoco.MjModel, level: Level, rng: np.random.Generator) -> None:
    lamp = model.light("lamp")
    direction = np.array([0.15, 0.35, -1.0]) + level.light * rng.uniform(-1, 1, 3) * (0.3, 0.4, 0)
    lamp.dir = direction / np.linalg.norm(direction)
    tint = 1 + 0.06 * level.light * rng.uniform(-1, 1, 3)
    if level.coloured_light:
        tint = np.array([(1.25, 0.85, 0.55), (0.65, 0.95, 1.3), (1.15, 0.75, 1.15)])[rng.integers(3)]
    lamp.diffuse = 0.68 * (1 + 0.25 * level.light * rng.uniform(-1, 1)) * tint
    ambient = 0.38 * (1 + 0.2 * level.light * rng.uniform(-1, 1))
    model.vis.headlight.ambient = ambient * tint
