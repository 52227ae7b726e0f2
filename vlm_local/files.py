"""Files that a reader may open at any moment, also after the writer was killed."""

import errno
import fcntl
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from vlm_local.errors import ConfigError

LOCK = ".lock"
_PACKAGE = Path(__file__).resolve().parent
MAX_JSON_BYTES = 64 << 20  # a description of a data set has a few kB


def encode_json(value: Any, indent: int | None = None) -> str:
    """JSON text; numpy arrays become lists and numpy numbers plain ones. Raises ValueError for NaN.

    Any bytes of a path's name can be written: those that are not UTF-8 are escaped.
    """
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False, default=_to_plain)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


@contextmanager
def open_replacing(path: Path) -> Iterator[TextIO]:
    """A text file to write that takes the place of `path` once it is whole; an error leaves `path` alone.

    A reader sees the old text or the new one, never a part. Folders are made where missing, and removed again after an
    error. Raises ConfigError where nothing can be written there.
    """
    check_no_folder(path)
    made = list_missing(path.parent)
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = beside.open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place") from None
    try:
        with file:
            yield file
        os.replace(beside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # of a full disk none is told
        raise
    finally:
        beside.unlink(missing_ok=True)
        if not path.exists():
            remove_unused(made)


def check_no_folder(path: Path) -> None:
    """Raises ConfigError where a file is to be written and a folder stands."""
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON in one step."""
    with open_replacing(path) as file:
        file.write(encode_json(value, indent=1) + "\n")


def list_missing(folder: Path) -> list[Path]:
    """The folder and those around it that are not there, the innermost first."""
    return list(itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents)))


def remove_unused(folders: Iterable[Path], unused: Iterable[str] = ()) -> None:
    """Remove these folders, the innermost first, up to one with more than empty files and those named `unused`."""
    with suppress(OSError):
        for folder in folders:
            entries = list(folder.iterdir())
            if any(entry.is_dir() or (entry.stat().st_size and entry.name not in unused) for entry in entries):
                return
            for entry in entries:
                entry.unlink()
            folder.rmdir()


def lock_folder(folder: Path) -> TextIO:
    """Take a folder for this process until the file returned is closed, or the process ends however it may.

    Raises ConfigError where another process has it.
    """
    file = (folder / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{folder} is in use by another process; choose another folder, or end that one") from None
    return file


def holds_lock(file: TextIO, folder: Path) -> bool:
    """Whether `file`, of lock_folder, is still the lock of this folder, which may have been removed or moved since."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat())
    except (OSError, ValueError):  # ValueError: closed
        return False


def is_locked(folder: Path) -> bool:
    """Whether a process has taken the folder by lock_folder."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def append_whole(file: BinaryIO, data: bytes) -> None:
    """All of `data` or nothing: half a line would spoil every line after it. file: unbuffered."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    except OSError:
        file.truncate(end)
        raise


def open_regular(path: Path) -> BinaryIO:
    """A file to read. Raises OSError for a FIFO or a device, which could keep the reader waiting for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def parse_json(text: str | bytes) -> Any:
    """JSON text -> its value. Raises ValueError for any other text, and for JSON nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError, also for a file of more than MAX_JSON_BYTES."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_JSON_BYTES >> 20} MB")
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a {type(value).__name__}, not a JSON object")
    return value


def read_json_lines(path: Path, report_torn: Callable[[int], None] = lambda num_bytes: None) -> Iterator[Any]:
    """The lines of a JSON lines file that this package wrote; the bytes of a last line that was cut off are reported.

    Raises ValueError for a whole line that is no JSON, OSError for a file that cannot be read.
    """
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                report_torn(len(line))
                return
            try:
                yield parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def read_foreign_json_lines(path: Path, report: Callable[[str], None]) -> Iterator[Any]:
    """The lines of somebody else's JSON lines file: the last may lack its newline, and empty lines are none.

    report: is given a sentence for every line that is no JSON. Raises OSError.
    """
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield parse_json(line)
                except ValueError as error:
                    report(f"{path}, line {number}: {error}")


def measure_free_disk(folder: Path) -> int:
    """Free bytes where this folder is, or would be made."""
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free


def find_shipped(name: str) -> Path:
    """Folder of shipped data, "grammars" or "checkpoints"."""
    for folder in (_PACKAGE / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the folder {name!r} is neither in {_PACKAGE} nor beside it; install the package again")
