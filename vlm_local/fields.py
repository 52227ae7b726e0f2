"""One field of a request -> what it means: a text, a measured state, a picture. Whatever cannot be read is refused.

An array in json_numpy text is `{"__numpy__": base64 of its raw bytes, "dtype": "<f8", "shape": [7]}`.
It is read here in a few lines, because a wire must refuse what json_numpy would accept: other dtypes, bytes that do not
fill the shape, shapes without an end.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from io import BytesIO
from itertools import chain
from typing import Any

import numpy as np
import pybase64
from PIL import Image, UnidentifiedImageError

from vlm_local.bounds import check_picture_file
from vlm_local.data.images import has_deep_colours, turn_upright
from vlm_local.errors import RequestError

MIN_SIDE, MAX_SIDE = 16, 4096

# Far beyond any arm; what is sent in millimetres or degrees soon lies beyond them, too. A gripper has units of its own.
MAX_POSITION_M, MAX_ANGLE_RAD, MAX_GRIPPER = 10.0, 4 * math.pi, 1000.0

_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248])|bool|u?int(?:8|16|32|64)|float(?:16|32|64)")
_STATE = "proprio: expected 7 numbers (gripper 0..1) or 8 (AutoEval's layout), "  # how a refusal begins
_DATA_URL = re.compile(r"data:image/(?:png|jpe?g);base64,", re.IGNORECASE)

# Told how many bytes a picture file will take before it is unpacked, as a small file may hold a large picture. Raises
# RequestError where there is no room.
Reserve = Callable[[int], None]


def take_any(num_bytes: int) -> None:
    """The Reserve that refuses no picture."""


def check_text(value: Any, name: str, most: int) -> str:
    """A string that says something, of at most `most` characters. Raises RequestError."""
    if not isinstance(value, str):
        raise RequestError(f"{name}: expected a string, got {show(value)}")
    if not value.strip():
        raise RequestError(f"{name}: it is empty")
    if len(value) > most:
        raise RequestError(f"{name}: {len(value)} characters are more than the {most} allowed")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{name}: it holds half a surrogate pair, which is no text")
    return value


def decode_state(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    if isinstance(value, dict):
        array = _decode_array(value, "proprio")
    elif isinstance(value, list):
        for number in value:
            if type(number) not in (int, float):
                raise RequestError(f"{_STATE}got {show(number)} among them")
        try:
            array = np.array(value, dtype=np.float64)
        except OverflowError:
            raise RequestError(f"{_STATE}got one too large for a double") from None
    else:
        raise RequestError(f"{_STATE}got {show(value)}")
    return check_state(array)


def check_state(array: np.ndarray) -> np.ndarray:
    """7 or 8 measured numbers -> the same as float64. Raises RequestError."""
    if array.shape not in ((7,), (8,)) or array.dtype.kind not in "iuf":
        raise RequestError(f"{_STATE}got {array.dtype} of shape {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise RequestError(f"{_STATE}all finite, got {array.tolist()}")
    limits = [*[MAX_POSITION_M] * 3, *[MAX_ANGLE_RAD] * 3, *[MAX_GRIPPER] * (len(array) - 6)]
    if (np.abs(array) > limits).any():
        raise RequestError(
            f"{_STATE}x, y, z in metres, up to {MAX_POSITION_M:g}, and angles in radians, up to {MAX_ANGLE_RAD:.1f}, "
            f"got {array.tolist()}"
        )
    return array


def decode_image(value: Any, reserve: Reserve = take_any) -> np.ndarray:
    """An image in any of the forms clients send -> uint8 (H, W, 3) RGB. Raises RequestError."""
    if isinstance(value, dict):
        return check_pixels(_decode_array(value, "image"))
    if isinstance(value, str):
        return _decode_image_file(value, reserve)
    if isinstance(value, list):
        return _decode_nested(value)
    raise RequestError(f"image: expected a json_numpy array, a nested list or a base64 PNG or JPEG, got {show(value)}")


def check_pixels(image: np.ndarray) -> np.ndarray:
    """The same. Raises RequestError unless it is uint8 (H, W, 3) with sides that a camera may have."""
    if image.dtype != np.uint8:
        raise RequestError(f"image: expected dtype uint8 with values 0..255, got {image.dtype}")
    _check_shape(image.shape)
    return image


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or shape[2] != 3 or not all(MIN_SIDE <= side <= MAX_SIDE for side in shape[:2]):
        raise RequestError(f"image: expected shape (H, W, 3) with sides {MIN_SIDE} to {MAX_SIDE}, got {shape}")


def _decode_array(value: Mapping[str, Any], name: str) -> np.ndarray:
    """A json_numpy object -> array; nothing is allocated beyond the bytes that came."""
    text, dtype, shape = (value.get(key) for key in ("__numpy__", "dtype", "shape"))
    if not isinstance(text, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise RequestError(f"{name}: expected a json_numpy object with the keys '__numpy__', 'dtype' and 'shape'")
    return build_array(_decode_base64(text, name), dtype, shape, name)


def build_array(data: bytes, dtype: str, shape: list, name: str) -> np.ndarray:
    """Bytes, a plain dtype's name and a shape -> array. Raises RequestError where they do not fit together."""
    if not _DTYPE.fullmatch(dtype):
        raise RequestError(f"{name}: dtype {dtype[:40]!r} is not allowed; send numbers such as '|u1' or '<f8'")
    if len(shape) > 4 or not all(type(side) is int and 0 < side <= 2**31 for side in shape):
        raise RequestError(f"{name}: {show(shape)} is no shape; expected up to 4 whole numbers above 0")
    kind = np.dtype(dtype)
    expected = math.prod(shape) * kind.itemsize
    if len(data) != expected:
        raise RequestError(f"{name}: {dtype} of shape {shape} takes {expected} bytes, but {len(data)} came")
    return np.frombuffer(data, kind).reshape(shape)


def _decode_base64(text: str | bytes, name: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError as error:
        alphabet = "its alphabet is A-Z, a-z, 0-9, + and /, padded with ="
        raise RequestError(f"{name}: broken base64 ({error}); {alphabet}") from None


def _decode_nested(rows: list) -> np.ndarray:
    """A nested list of whole numbers -> uint8 (H, W, 3)."""
    shape, first = [], rows
    while isinstance(first, list) and len(shape) < 5:
        shape.append(len(first))
        first = first[0] if first else None
    _check_shape(tuple(shape))
    if not all(isinstance(row, list) and len(row) == shape[1] for row in rows):
        raise RequestError("image: the nested list is ragged; expected rows of equal length")
    pixels = list(chain.from_iterable(rows))
    if not all(isinstance(pixel, list) and len(pixel) == 3 for pixel in pixels):
        raise RequestError("image: expected a nested list of shape (H, W, 3), but a pixel is not 3 numbers")
    try:
        if isinstance(first, bool):  # `bytes` takes it, and nothing else but whole numbers 0..255
            raise TypeError
        data = bytes(chain.from_iterable(pixels))
    except (TypeError, ValueError):
        odd = next(value for value in chain.from_iterable(pixels) if type(value) is not int or not 0 <= value <= 255)
        raise RequestError(f"image: expected whole numbers 0..255 in the nested list, got {show(odd)}") from None
    return np.frombuffer(data, np.uint8).reshape(shape)


def _decode_image_file(text: str, reserve: Reserve) -> np.ndarray:
    """Base64 of a PNG or JPEG file, bare or as a data URL. Its size is checked before it is unpacked."""
    prefix = _DATA_URL.match(text)
    if prefix is None and text[:5].lower() == "data:":
        raise RequestError(f"image: a data URL must start with data:image/png;base64, or jpeg, not {text[:40]!r}")
    plain = text[prefix.end() if prefix else 0 :].encode("ascii", "replace")
    return decode_picture_file(_decode_base64(plain.translate(None, b" \t\r\n"), "image"), reserve)


def decode_picture_file(data: bytes, reserve: Reserve) -> np.ndarray:
    """The bytes of a PNG or JPEG file -> uint8 (H, W, 3). Raises RequestError."""
    check_picture_file(data)
    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG")) as file:
            _check_shape((file.height, file.width, 3))
            if has_deep_colours(data):
                raise RequestError("image: expected 8 bits a channel, got a PNG of 16 bits")
            reserve(file.height * file.width * 3)
            turn_upright(file)
            return np.asarray(file if file.mode == "RGB" else file.convert("RGB"))
    except RequestError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for a broken file; one of them names an object in memory
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise RequestError(f"image: the {len(data)} bytes are no PNG or JPEG file{reason}") from None


def show(value: Any) -> str:
    """A value for a message, never longer than a line."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    # `repr`: websocket's clients send bytes, too.
    text = json.dumps(value[:60] if isinstance(value, str) else value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
