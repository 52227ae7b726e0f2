"""Output that nobody waits for: lines are queued for a thread that writes them, and dropped where it falls behind."""

import logging
import os
import queue
import threading
from contextlib import suppress

STDOUT, STDERR = 1, 2

_BACKLOG = 1000  # lines
_FLUSH_S = 1.0  # at the end of the process


class LineWriter:
    """Writes to a file descriptor. A full pipe (a stopped terminal, a stuck log driver) costs lines, no time."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(_BACKLOG)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="lines", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line; never waits, and drops it where the queue is full."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_dropped += 1

    def close(self) -> None:
        """Write what is queued, for a second at most."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=_FLUSH_S)
            self._thread.join(_FLUSH_S)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._num_dropped = self._num_dropped, 0
            self._write(line)
            if dropped:
                self._write(f"{dropped} lines were dropped here: they are read more slowly than written")

    def _write(self, line: str) -> None:
        # Not through sys.stderr: a thread that waits in there keeps its lock, and the interpreter's end waits for that.
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with suppress(OSError):  # closed: nobody will read it
            while data:
                data = data[os.write(self._descriptor, data) :]


class DroppingHandler(logging.Handler):
    """Logs to stderr through a LineWriter."""

    def __init__(self):
        super().__init__()
        self._writer = LineWriter(STDERR)

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.put(self.format(record))

    def close(self) -> None:
        self._writer.close()
        super().close()


def start_logging(line: str, level: int = logging.INFO) -> None:
    """Everything from `level` on, and Python's warnings, to stderr. line: as logging's `format`."""
    logging.basicConfig(level=level, format=line, handlers=[DroppingHandler()])
    logging.captureWarnings(True)
    if not os.isatty(STDERR):
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars write to stderr themselves


def take_over_logging() -> None:
    """Have libraries that were imported meanwhile log through our handler: some write to stderr themselves and wait."""
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
