"""A small file that outlives the server: written by a thread of its own, and again until it is."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_RETRY_S = 2.0  # until what could not be written is tried again


class StateFile:
    """One small file, written by a thread of its own, so that a disk that hangs keeps nobody waiting for long.

    What cannot be written (a full disk) is tried again until it is: else a restart after the disk was made free would
    not know of a hold, or would open a gripper.
    """

    def __init__(self, path: Path, encode: Callable[[], str]):
        self._path = path
        self._encode = encode
        self._changed = threading.Condition()
        self._num_wanted = self._num_tried = self._num_failed = 0
        self._is_behind = False  # whether the last try failed
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="state", daemon=True)
        self._thread.start()

    def write(self, timeout_s: float) -> bool:
        """Have the present state written. True when it was, within this time."""
        with self._changed:
            self._num_wanted += 1
            number = self._num_wanted
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._num_tried >= number, timeout_s)
            return done and self._num_failed < number

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(1)

    def _run(self) -> None:
        closed = False
        while not closed:
            with self._changed:
                retry_s = _RETRY_S if self._is_behind else None
                self._changed.wait_for(lambda: self._num_wanted > self._num_tried or self._closed, retry_s)
                number, closed = self._num_wanted, self._closed
                if number == self._num_tried and not self._is_behind:
                    continue
            failed = not self._try()
            with self._changed:
                self._num_tried = number
                self._num_failed = number if failed else self._num_failed
                self._changed.notify_all()

    def _try(self) -> bool:
        beside = self._path.with_name(f"{self._path.name}.new")
        was_behind = self._is_behind
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(self._encode())
                file.flush()
                os.fsync(file.fileno())  # a hold outlasts a power cut
            os.replace(beside, self._path)
        except OSError as error:
            self._is_behind = True
            if not was_behind:
                logger.error(
                    "%s cannot be written (%s): until it can, a restart would not know holds and grippers",
                    self._path, error,
                )  # fmt: skip
            return False
        self._is_behind = False
        if was_behind:
            logger.warning("%s is written again: a restart knows holds and grippers", self._path)
        return True
