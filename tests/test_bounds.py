"""Files that would take long to decode are refused, ordinary ones of the same kind are read."""

import base64
import json
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from vlm_local.bounds import MAX_PARTS, MAX_SCANS, check_json
from vlm_local.errors import RequestError
from vlm_local.fields import decode_image

SMOOTH = np.full((48, 64, 3), 90, np.uint8)


def _read(data: bytes) -> np.ndarray:
    return decode_image(base64.b64encode(data).decode())


def _save(kind: str, **options) -> bytes:
    file = BytesIO()
    Image.fromarray(SMOOTH).save(file, kind, **options)
    return file.getvalue()


def _pack(name: bytes, data: bytes = b"") -> bytes:
    """A chunk of a PNG file."""
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def _repeat_last_scan(jpeg: bytes, times: int) -> bytes:
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:start] + jpeg[start:-2] * times + jpeg[-2:]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + b"\xff\xda" * 5000}])
def test_ordinary_jpegs_are_read(options):
    jpeg = _save("JPEG", **options)
    for data in (jpeg, jpeg[:2] + b"\xff\xff\xff" + jpeg[2:]):
        assert abs(_read(data).astype(int) - SMOOTH).max() <= 2


def test_a_jpeg_of_many_scans_is_refused():
    with pytest.raises(RequestError, match=rf"has \d+ scans; {MAX_SCANS} are allowed"):
        _read(_repeat_last_scan(_save("JPEG", progressive=True), 3 * MAX_SCANS))


@pytest.mark.parametrize("part", [b"\xff", b"\0", b"\xff\x00", b"\xff\x01", b"\xff\xfe\0\2"])
def test_a_jpeg_of_many_parts_is_refused(part):
    jpeg = _save("JPEG")
    with pytest.raises(RequestError, match=f"more than {MAX_PARTS}"):
        _read(jpeg[:2] + part * (MAX_PARTS + 1) + jpeg[2:])


def test_a_png_of_many_parts_is_refused():
    png = _save("PNG")
    note = _pack(b"prVt")
    np.testing.assert_array_equal(_read(png[:33] + note * 100 + png[33:]), SMOOTH)
    with pytest.raises(RequestError, match=f"more than {MAX_PARTS}"):
        _read(png[:33] + note * MAX_PARTS + png[33:])


@pytest.mark.parametrize(
    "data", [b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\xff", b"\x89PNG", b"\x89PNG\r\n\x1a\n\0"]
)
def test_a_file_that_is_cut_off_is_no_file(data):
    with pytest.raises(RequestError, match="no PNG or JPEG file") as caught:
        _read(data)
    assert " object at 0x" not in str(caught.value)


def test_a_dark_picture_as_a_nested_list_is_no_bomb():
    """Its lists are as short as those of pixels can be."""
    check_json(json.dumps(np.zeros((256, 256, 3), int).tolist(), separators=(",", ":")).encode())
    with pytest.raises(RequestError, match="more lists than"):
        check_json(b"[" * 2**17 + b"]" * 2**17)
