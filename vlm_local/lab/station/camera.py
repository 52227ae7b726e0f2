"""What a station's camera sends: 640x480 pixels as JPEG, squeezed to the square that policy and detector see."""

import numpy as np

from vlm_local.data.images import decode_image, encode_file, squeeze
from vlm_local.sim.rendering import Camera
from vlm_local.sim.scene import CAMERA
from vlm_local.sim.world import World

IMAGE_SIZE = 256
_PIXELS = (640, 480)
_QUALITY, _SUBSAMPLING = 95, "4:2:0"  # as OpenCV encodes, unless it is told otherwise


class StationCamera:
    """Looks at a world. The squeezed picture shows what the simulator's square camera shows, as policies know it."""

    def __init__(self, world: World):
        """Raises ConfigError where no picture can be drawn."""
        self._world = world
        self._camera = Camera(world.model, CAMERA, _PIXELS)

    def take(self) -> np.ndarray:
        """uint8 (256, 256, 3) RGB of the present."""
        seen = self._camera.render(self._world.data)
        sent = encode_file(seen, "JPEG", quality=_QUALITY, subsampling=_SUBSAMPLING)
        return squeeze(decode_image(sent, "the station's camera"), IMAGE_SIZE)

    def close(self) -> None:
        self._camera.close()
