"""Frames of recordings: encoded or raw -> uint8 RGB, checked."""

import io
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm_local.errors import DataError

MIN_SIDE, MAX_SIDE = 16, 4096
_MAIN_CAMERAS = ("image_0", "image_primary", "image")  # looked for in this order
_MOVING = ("wrist", "hand", "gripper")  # words in the names of cameras that move with the arm


def decode_image(data: bytes, source: str) -> np.ndarray:
    """PNG or JPEG bytes -> uint8 (H, W, 3). Raises DataError for anything else, and for non-RGB."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.mode != "RGB":
                raise DataError(f"{source}: an RGB image was expected, this one is {image.mode}")
            return check_image(np.asarray(image), source)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:  # Pillow raises all four
        raise DataError(f"{source}: not a readable PNG or JPEG image ({error})") from None


def choose_camera(cameras: Iterable[str], camera: str | None, source: str) -> str:
    """`camera`, or the data set's main one for None: no depth map, and a wrist camera only where there is no other.

    Raises DataError with the names that there are.
    """
    cameras = list(cameras)
    if camera is None:
        shown = [name for name in cameras if "depth" not in name.lower()]
        outside = [name for name in shown if not any(word in name.lower() for word in _MOVING)]
        camera = next((name for name in (*_MAIN_CAMERAS, *outside, *shown) if name in shown), None)
    if camera not in cameras:
        raise DataError(f"{source} has no camera {camera or ''!r}; it has {', '.join(cameras) or 'none'}")
    return camera


def check_image(image: np.ndarray, source: str) -> np.ndarray:
    """`image` if it is uint8 (H, W, 3) with sides a policy takes; raises DataError otherwise."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{source}: a uint8 RGB image (H, W, 3) was expected, this one is {image.dtype} {image.shape}")
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in image.shape[:2]):
        raise DataError(f"{source}: image sides of {MIN_SIDE} to {MAX_SIDE} were expected, not {image.shape[:2]}")
    return image


def require_one_size(load_image: Callable[[int], np.ndarray], source: str) -> Callable[[int], np.ndarray]:
    """`load_image`, refusing frames of another size than the first one loaded in this episode.

    A camera does not change its size: such a frame came from elsewhere.
    """
    first: list[tuple[int, tuple[int, ...]]] = []

    def load(step: int) -> np.ndarray:
        image = load_image(step)
        if not first:
            first.append((step, image.shape))
        if image.shape != first[0][1]:
            raise DataError(
                f"{source}, step {step}: the frame is {image.shape}, but step {first[0][0]} of the episode was "
                f"{first[0][1]}; mixed sizes are not one camera"
            )
        return image

    return load
