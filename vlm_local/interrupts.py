"""Ctrl-C: which processes hear it, and how soon the command ends then."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

_GRACE_S = 0.8  # below the second for which a model's thread is waited for: see EngineWorker.close


class InterruptWatch:
    """Ends this process soon after a SIGINT, whatever its threads do, and says one line, once.

    Python raises KeyboardInterrupt in the main thread as ever. It may not get there for long: in a forward,
    or while it waits for a thread that asks a server. Nothing on disk needs more than a kill leaves whole.
    """

    def __init__(self, line: str):
        self._line = f"\n{line}\n".encode()
        self._telling = threading.Lock()
        self._is_told = False

    def start(self) -> None:
        """From the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written at once, also while the main thread computes
        threading.Thread(target=self._watch, args=(reader,), name="interrupts", daemon=True).start()

    def tell(self) -> None:
        with self._telling:
            if not self._is_told:
                self._is_told = True
                with suppress(OSError):
                    os.write(2, self._line)  # a thread that hangs may hold the lock of sys.stderr

    def _watch(self, reader: int) -> None:
        while signal.SIGINT not in os.read(reader, 64):
            pass
        time.sleep(_GRACE_S)
        self.tell()
        os._exit(130)


@contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that the block starts do not hear Ctrl-C: a terminal sends it to all, and it is for their parent."""
    resource_tracker.ensure_running()  # here, since it lets this thread hear SIGINT again after it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """In a process of multiprocessing: end it when its parent ends, also where that is killed."""
    threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def end_children() -> None:
    """End what multiprocessing has started here, in the middle of whatever it does."""
    for child in multiprocessing.active_children():
        child.terminate()
