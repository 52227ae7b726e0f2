"""Sets of scenes: named by level, seed and number, and frozen by the hash of what they hold."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm_local.errors import ConfigError
from vlm_local.files import encode_json
from vlm_local.lab.spatial.changes import CHANGES, NONE
from vlm_local.lab.spatial.scenes import sample_scene
from vlm_local.lab.spatial.stage import Stage, View
from vlm_local.sim.levels import find_level


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


class Gallery:
    """Shows every scene of a set, as it is and under every change, and freezes what it showed."""

    def __init__(self, scene_set: SceneSet, drawn: bool = True):
        self._set = scene_set
        self._level = find_level(scene_set.level)
        self._stage = Stage(self._level, drawn)
        self._drawn = drawn

    def show_all(self) -> Iterator[tuple[int, View]]:
        """(index of the scene, view), each scene's first as it is; ends with `frozen` filled in."""
        scenes, images = hashlib.sha256(), hashlib.sha256()
        for index in range(self._set.scenes):
            for name in (NONE.name, *CHANGES):
                view = self.show(index, name)
                signs = None if view.signs is None else tuple(view.signs)
                told = [index, name, view.scene.instruction, signs, asdict(view.scene)]
                scenes.update(encode_json(told).encode())
                images.update(view.observation.image.tobytes())
                yield index, view
        self.frozen = SceneSet(
            self._set.level,
            self._set.seed,
            self._set.scenes,
            scenes.hexdigest(),
            images.hexdigest() if self._drawn else self._set.images_sha256,
        )

    def show(self, index: int, name: str) -> View:
        scene = sample_scene(self._level, self._set.seed, index)
        return self._stage.show(scene, CHANGES.get(name, NONE))

    def close(self) -> None:
        self._stage.close()


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
