"""Ctrl-C: how soon a command ends then."""

import atexit
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

_GRACE_S = 0.5  # a model's thread is waited for for a second: see EngineWorker.close


class InterruptWatch:
    """Ends this process soon after a SIGINT, whatever its threads do, and says one line, once.

    Python raises KeyboardInterrupt in the main thread as ever. It may not get there for long: in a forward,
    or while it waits for a thread that asks a server. Nothing on disk needs more than a kill leaves whole.
    """

    def __init__(self, line: str):
        self._line = f"\n{line}\n".encode()
        self._telling = threading.Lock()
        self._is_told = False
        # Also where a library made another error of it, as C modules do while they load.
        self.has_come = False

    def start(self) -> None:
        """From the main thread, before anything registers what is to be done at the exit."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else who started this wants it ignored
            signal.signal(signal.SIGINT, self._interrupt)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written at once, also while the main thread computes
        threading.Thread(target=self._watch, args=(reader,), name="interrupts", daemon=True).start()
        atexit.register(self._skip_teardown)  # the first that is registered is the last that is called

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.has_come = True
        raise KeyboardInterrupt

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

    def _skip_teardown(self) -> None:
        """Taking apart an interpreter that has loaded torch costs a second on a busy machine."""
        if self._is_told:
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(130)
