"""Frames of recordings: encoded or raw -> uint8 RGB, checked; and back into a file."""

import io
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_local.errors import DataError
from vlm_local.files import open_regular

MIN_SIDE, MAX_SIDE = 16, 4096
MAX_IMAGE_BYTES = 100 << 20  # twice the largest image without compression
_SCAN, _MAX_SCANS = b"\xff\xda", 100  # a progressive JPEG has some ten; each may take as long as the whole picture
_MAIN_CAMERAS = ("image_0", "image_primary", "image")  # looked for in this order
_MOVING = ("wrist", "hand", "gripper")  # words in the names of cameras that move with the arm


def decode_image(data: bytes, source: str, any_colours: bool = False) -> np.ndarray:
    """PNG or JPEG bytes -> uint8 (H, W, 3). Raises DataError for anything else, and for non-RGB.

    What a file claims is looked at before it is decoded. any_colours: grey, palettes and CMYK become RGB, and what is
    transparent shows the colour below: no camera made the picture.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"{source}: an image file of at most {MAX_IMAGE_BYTES >> 20} MB was expected")
    if data.startswith(b"\xff\xd8") and data.count(_SCAN) > _MAX_SCANS:
        raise DataError(f"{source}: a JPEG of at most {_MAX_SCANS} scans was expected, it has {data.count(_SCAN)}")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            _check_sides(image.size[::-1], source)
            if image.mode != "RGB" and not any_colours:
                raise DataError(f"{source}: an RGB image was expected, this one is {image.mode}")
            if has_deep_colours(data):
                raise DataError(f"{source}: 8 bits a channel were expected, this PNG has 16")
            turn_upright(image)
            return check_image(np.asarray(image.convert("RGB")), source)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{source}: not a readable PNG or JPEG image ({error})") from None


def has_deep_colours(data: bytes) -> bool:
    """Whether a PNG file has 16 bits a channel: Pillow keeps the upper 8, which are black where a camera has 12."""
    return data.startswith(b"\x89PNG") and data[24:25] > b"\x08"


def turn_upright(image: Image.Image) -> None:
    """As viewers and OpenCV show it: a camera that is held sideways notes that in EXIF. A broken note says nothing."""
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def read_image(path: Path, any_colours: bool = False) -> np.ndarray:
    """The picture in a file, as decode_image. Raises DataError."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return decode_image(data, str(path), any_colours)


def encode_file(image: np.ndarray, kind: str, **options: Any) -> bytes:
    """uint8 (H, W, 3) -> a file. kind: "PNG" or "JPEG". options: as Pillow takes them."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


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
        wanted = "in colour" if camera is None else repr(camera)
        raise DataError(f"{source} has no camera {wanted}; it has {', '.join(cameras) or 'none'}")
    return camera


def check_image(image: np.ndarray, source: str) -> np.ndarray:
    """`image` if it is uint8 (H, W, 3) with sides a policy takes; raises DataError otherwise."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{source}: a uint8 RGB image (H, W, 3) was expected, this one is {image.dtype} {image.shape}")
    _check_sides(image.shape[:2], source)
    return image


def squeeze(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (side, side, 3), whatever its proportions. As `cv2.resize` does it: not smoothed."""
    for axis in (0, 1):
        length = image.shape[axis]
        if length == side:
            continue
        place = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
        low = place.astype(int)
        share = (place - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1)).astype(np.float32)
        image = np.take(image, low, axis) * (1 - share) + np.take(image, np.minimum(low + 1, length - 1), axis) * share
    return np.rint(image).astype(np.uint8)


def _check_sides(sides: tuple[int, ...], source: str) -> None:
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise DataError(f"{source}: image sides of {MIN_SIDE} to {MAX_SIDE} were expected, not {sides}")


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
