"""Frames are read again when they are asked for; what they came from is kept for the next one."""

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def keep_last(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load(path, *key)`, whose last result is kept, one for each thread.

    So episodes can be kept without what they are read from: memory and open files do not grow with their number, and
    steps that are read in order cost one load. A result with a `close` is closed. A file that was changed is loaded
    again. Raises OSError.
    """
    last = threading.local()

    def load_or_recall(path: Path, *key: Any) -> Any:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a FIFO would keep the reader waiting for ever
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        wanted = (path, status.st_size, status.st_mtime_ns, *key)
        if getattr(last, "key", None) != wanted:
            close = getattr(getattr(last, "value", None), "close", None)
            last.key = last.value = None  # freed before the next one takes room
            if close is not None:
                close()
            last.value = load(path, *key)
            last.key = wanted
        return last.value

    return load_or_recall
