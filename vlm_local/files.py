"""Files that a reader may open at any moment, also after the writer was killed."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vlm_local.errors import ConfigError

_LOCK = ".lock"


def encode_json(value: Any, indent: int | None = None) -> str:
    """JSON text; numpy arrays become lists and numpy numbers plain ones. Raises ValueError for NaN."""
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False, default=_to_plain)


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


@contextmanager
def open_replacing(path: Path) -> Iterator[TextIO]:
    """A text file to write that takes the place of `path` once it is whole; an error leaves `path` alone.

    A reader sees the old text or the new one, never a part. Folders are made where missing. Raises
    ConfigError where nothing can be written there.
    """
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = beside.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place") from None
    try:
        with file:
            yield file
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON in one step."""
    with open_replacing(path) as file:
        file.write(encode_json(value, indent=1) + "\n")


def lock_folder(folder: Path) -> TextIO:
    """Take a folder for this process until the file returned is closed, or the process ends however it may.

    Raises ConfigError where another process has it.
    """
    file = (folder / _LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{folder} is in use by another process; choose another folder, or end that one") from None
    return file


def is_locked(folder: Path) -> bool:
    """Whether a process has taken the folder by lock_folder."""
    try:
        with (folder / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_json_lines(path: Path, report_torn: Callable[[int], None] = lambda num_bytes: None) -> Iterator[Any]:
    """The whole lines of a JSON lines file; the bytes of a last line that was cut off are reported.

    Raises ValueError for a whole line that is no JSON, OSError for a file that cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                report_torn(len(line))
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
