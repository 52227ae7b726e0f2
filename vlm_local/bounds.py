"""What a request asks for is bounded before it is parsed: a small one can ask for much.

The JSON parser holds the interpreter's lock, on which all threads wait. A scan of a JPEG goes over all its pixels, but
may take 40 bytes of the file; Pillow reads each part of a file's head in Python, where a part may be one byte.
"""

from vlm_local.errors import RequestError

MAX_LISTED = 8_000_000  # bytes; a 640x480 picture as a nested list takes 5.2 million at most
MAX_SCANS = 100  # a progressive JPEG has 10 or so
MAX_PARTS = 16_384  # a 4096x4096 PNG in chunks of 8 kB has 6,000

_SMALL_BODY = 2**17  # parsed in a few milliseconds whatever it holds
_PIXEL_BYTES = len("[0,0,0],")
_MANY_FIELDS = 10_000  # colons may also stand in its texts, a few thousand at most
_MANY = 1000  # commas and escapes in a body whose bulk is one text
_ALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG markers that no length follows
_START_OF_SCAN = 0xDA


def check_json(body: bytes) -> None:
    """Refuse what would take long to parse: all threads wait for the JSON parser, and each list takes 88 bytes."""
    if len(body) > MAX_LISTED:
        check_one_text(body, len(body))
    elif len(body) > _SMALL_BODY and body.count(b"[") * _PIXEL_BYTES > len(body) + _SMALL_BODY:
        raise RequestError("image: the body has more lists than a nested list of pixels of its length")
    elif len(body) > _SMALL_BODY and max(body.count(b"{"), body.count(b":")) > _MANY_FIELDS:
        raise RequestError("the body has more objects and fields than a request")


def check_one_text(part: bytes, num_bytes: int) -> None:
    """Refuse a body of so many bytes, more than MAX_LISTED, for any part of it that shows lists."""
    if _holds_many(part, b",") or _holds_many(part, b"\\"):
        raise RequestError(
            f"the body has {num_bytes} bytes; above {MAX_LISTED} the picture must be one text: "
            "json_numpy, or a PNG or JPEG file in base64",
            413,
        )


def _holds_many(body: bytes, mark: bytes) -> bool:
    """By `find`, which takes a sixth of the time of `count` where there are few."""
    position = -1
    for _ in range(_MANY):
        position = body.find(mark, position + 1)
        if position < 0:
            return False
    return True


def check_picture_file(data: bytes) -> None:
    """Raises RequestError; what is neither PNG nor JPEG is left to the decoder."""
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)


def _check_jpeg(data: bytes) -> None:
    position, num_parts = 2, 0
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] == 0xFF and marker == _START_OF_SCAN:
            break
        _count_part(num_parts := num_parts + 1)
        if data[position] != 0xFF or marker in (0x00, 0xFF):  # padding
            position += 1
        elif marker in _ALONE:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    # In a scan's own data 0xFF is always followed by 0.
    num_scans = data.count(bytes([0xFF, _START_OF_SCAN]), position)
    if num_scans > MAX_SCANS:
        raise RequestError(f"image: the JPEG file has {num_scans} scans; {MAX_SCANS} are allowed")


def _check_png(data: bytes) -> None:
    position, num_parts = 8, 0
    while position < len(data):
        _count_part(num_parts := num_parts + 1)
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _count_part(num_parts: int) -> None:
    if num_parts > MAX_PARTS:
        raise RequestError(f"image: the file has more than {MAX_PARTS} chunks or segments")
