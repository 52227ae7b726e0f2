"""TFRecord files and the tf.Example messages in them, without TensorFlow.

A record is: length uint64, masked CRC32C of the length, data, masked CRC32C of the data, all little
endian (tensorflow/core/lib/io/record_writer.h). An Example is a protobuf map from feature name to a
list of bytes, floats or integers (tensorflow/core/example/feature.proto).
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from vlm_local.errors import DataError, Report
from vlm_local.files import open_regular

MAX_RECORD_BYTES = 1 << 31
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def mask_crc(data: bytes) -> int:
    """CRC32C of `data`, rotated and shifted as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path, report: Report, start: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """(offset, data) of each record from byte `start` on; data is None for one that goes to `report`.

    That is one with a wrong checksum, or of more than MAX_RECORD_BYTES. After a broken length nothing says where the
    next record begins: the rest of the file is given up.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        offset = file.seek(start)
        while offset < size:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or mask_crc(header[:8]) != _HEADER.unpack(header)[1]:
                lost = f"the last {size - offset} bytes are lost"
                report(DataError(f"{path}, byte {offset}: {_describe_start(header)}; {lost}"))
                return
            length, _ = _HEADER.unpack(header)
            if offset + _HEADER.size + length + _FOOTER.size > size:
                report(DataError(f"{path}, byte {offset}: the file ends within this record of {length} bytes"))
                return
            yield offset, _read_intact(file, length, f"{path}, byte {offset}", report)
            offset = file.seek(offset + _HEADER.size + length + _FOOTER.size)


def _describe_start(header: bytes) -> str:
    """What a file is that begins with no record."""
    if header.startswith(b"version http"):
        return "this is Git LFS's pointer to the file, which `git lfs pull` downloads"
    if header.startswith(b"\x1f\x8b"):
        return "the file is compressed; gunzip it first"
    return "no record begins here"


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _read_intact(file: BinaryIO, length: int, source: str, report: Report) -> bytes | None:
    """A record's data where its checksum is right."""
    if length > MAX_RECORD_BYTES:
        report(DataError(f"{source}: a record of {length} bytes; TensorFlow itself writes none over 2 GiB"))
        return None
    data = file.read(length)
    if _FOOTER.unpack(file.read(_FOOTER.size))[0] != mask_crc(data):
        report(DataError(f"{source}: the checksum of this record of {length} bytes is wrong"))
        return None
    return data


def count_records(path: Path) -> int:
    """Records by their headers alone: nothing is checked, and the data is not read."""
    count = 0
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        while file.tell() + _HEADER.size <= size:
            length, _ = _HEADER.unpack(file.read(_HEADER.size))
            file.seek(min(length + _FOOTER.size, size), 1)
            count += 1
    return count


def parse_example(data: bytes) -> dict[str, memoryview]:
    """Feature name -> its undecoded message, for `decode_bytes` and `decode_floats`.

    Raises ValueError for bytes that are no Example.
    """
    features = {}
    for number, message in _iterate_fields(memoryview(data)):
        for _, entry in _iterate_fields(message) if number == 1 else ():
            pair = dict(_iterate_fields(entry))
            features[str(pair.get(1, b""), "utf-8")] = pair.get(2, memoryview(b""))
    return features


def decode_bytes(feature: memoryview) -> list[memoryview]:
    """A feature's bytes list."""
    return [value for number, values in _iterate_fields(feature) if number == 1 for _, value in _iterate_fields(values)]


def decode_floats(feature: memoryview) -> np.ndarray:
    """A feature's float list, float32 (n,), packed or not."""
    parts = [
        value for number, values in _iterate_fields(feature) if number == 2 for _, value in _iterate_fields(values)
    ]
    return np.frombuffer(b"".join(parts), "<f4")


def _iterate_fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, bytes) of a protobuf message; variable-length integers are passed over."""
    position, end = 0, len(message)
    while position < end:
        key, position = _read_varint(message, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            _, position = _read_varint(message, position)
            continue
        if wire_type == _BYTES:
            length, position = _read_varint(message, position)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"protobuf wire type {wire_type} is unknown")
        if position + length > end:
            raise ValueError(f"a protobuf field of {length} bytes runs past its message")
        yield key >> 3, message[position : position + length]
        position += length


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message) and shift < 64:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("a protobuf integer is cut off")
