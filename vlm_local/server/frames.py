"""Frames of websocket clients: msgpack maps that hold NumPy arrays, in the three spellings in use.

Spelling  who                                      an array is a map with
openpi    openpi-client, RoboArena, vLLM-Omni      bytes keys __ndarray__, data, dtype, shape
vla-eval  vla-eval; pictures also as __image__     the same as text
numpy     the msgpack-numpy package                bytes keys nd, type, kind, shape, data

Arrays are built only where they are read, from plain dtypes and never larger than the bytes that came.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgpack
import numpy as np

from vlm_local.errors import RequestError
from vlm_local.fields import Reserve, build_array, check_pixels, decode_picture_file

MAX_FRAME = 2**24  # bytes; five cameras of 1024x1024 pixels, uncompressed
_MAX_ITEMS = 4096  # of a list or map: msgpack reserves them before they come, for each level of nesting
_MAX_NAMED = 12  # names that an error lists

Spelling = Literal["openpi", "vla-eval", "numpy"]


def unpack(frame: bytes | str) -> dict[Any, Any]:
    """A binary frame -> the map in it, arrays still as maps. Raises RequestError for anything else."""
    if isinstance(frame, str):
        raise RequestError("a text frame came; send msgpack in a binary frame")
    try:
        value = msgpack.unpackb(
            frame, ext_hook=_refuse_extension, max_array_len=_MAX_ITEMS, max_map_len=_MAX_ITEMS, strict_map_key=True
        )
    except RequestError:
        raise
    except Exception as error:  # msgpack raises half a dozen kinds
        raise RequestError(f"the frame is no msgpack: {error or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the frame must hold a map, but holds {_show(value)}")
    return value


def _refuse_extension(code: int, data: bytes) -> None:
    raise RequestError(f"msgpack extension {code} is not read; send maps, lists, numbers, text and bytes")


def pack(fields: Mapping[str, Any] | np.ndarray, spelling: Spelling) -> bytes:
    """A map or an array -> a binary frame; arrays are written as the client reads them."""

    def encode(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return _encode_array(value, spelling)
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{type(value).__name__} cannot be sent")

    frame = msgpack.packb(fields, default=encode)
    assert frame is not None  # it is None only where the packer keeps its buffer, which is not asked for
    return frame


def _encode_array(array: np.ndarray, spelling: Spelling) -> dict[Any, Any]:
    dtype, shape, data = array.dtype.str, list(array.shape), np.ascontiguousarray(array).tobytes()
    if spelling == "numpy":
        return {b"nd": True, b"type": dtype, b"kind": b"", b"shape": shape, b"data": data}
    fields = {"__ndarray__": True, "data": data, "dtype": dtype, "shape": shape}
    return fields if spelling == "vla-eval" else {name.encode(): value for name, value in fields.items()}


def find_spelling(value: Any) -> Spelling | None:
    """How this value is written, if it is an array."""
    if not isinstance(value, dict):
        return None
    if value.get(b"__ndarray__") is True:
        return "openpi"
    if value.get("__ndarray__") is True or value.get("__image__") is True:
        return "vla-eval"
    return "numpy" if value.get(b"nd") is True or value.get("nd") is True else None


def read_array(value: Any, name: str) -> np.ndarray:
    """An array, or a list of numbers -> ndarray. name: of the field, for the error. Raises RequestError."""
    if isinstance(value, list) and all(type(number) in (int, float) for number in value):
        try:
            return np.array(value, np.float64)
        except OverflowError:
            raise RequestError(f"{name}: a number is too large for a double") from None
    if not isinstance(value, dict) or find_spelling(value) is None:
        raise RequestError(f"{name}: expected a NumPy array or a list of numbers, got {_show(value)}")
    fields = {_decode_name(key): entry for key, entry in value.items()}
    dtype, shape, data = fields.get("dtype", fields.get("type")), fields.get("shape"), fields.get("data")
    dtype = _decode_name(dtype)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(data, bytes):
        raise RequestError(f"{name}: an array has data (bytes), dtype (text) and shape (list of whole numbers)")
    return build_array(data, dtype, shape, name)


def read_picture(value: Any, reserve: Reserve) -> np.ndarray:
    """The picture to decide on -> uint8 (H, W, 3) RGB. Raises RequestError."""
    if isinstance(value, dict) and value.get("__image__") is True and value.get("format") != "raw":
        if value.get("format") not in ("png", "jpeg"):
            raise RequestError(f"image: expected the format png, jpeg or raw, got {_show(value.get('format'))}")
        if not isinstance(value.get("data"), bytes):
            raise RequestError(f"image: data must be the bytes of a {value['format']} file")
        return decode_picture_file(value["data"], reserve)
    image = read_array(value, "image")
    return check_pixels(image[:, :, :3] if image.ndim == 3 and image.shape[2] == 4 else image)


def _decode_name(name: Any) -> Any:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


def list_names(fields: Mapping[Any, Any]) -> str:
    """Its keys, for an error."""
    names = [f"{_decode_name(name)!s:.60}" for name in list(fields)[:_MAX_NAMED]]
    return ", ".join(names) + (" ..." if len(fields) > _MAX_NAMED else "") if names else "nothing"


def _show(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, dict | list | bytes) else repr(value)[:60]
