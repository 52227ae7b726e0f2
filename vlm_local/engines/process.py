"""An engine in a process of its own, so that its forwards and the server's threads do not wait for each other.

A forward is thousands of short calls into torch. After each one it needs Python's interpreter lock, which other
threads of the same process hold while they decode requests, encode pictures or write a recording.
"""

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

import psutil

from vlm_local.engines import Engine, Outcome, as_engine_error
from vlm_local.engines.parts import RepeatedParts
from vlm_local.errors import EngineError, VLMLocalError
from vlm_local.logs import start_logging, take_over_logging
from vlm_local.processes import deaf_children, die_with_parent
from vlm_local.types import GenerationRequest, Thought, ThoughtRequest

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.25
_RESTART_EVERY_S = 30.0  # at the latest, where loading fails again and again


class EngineProcess:
    """The engine that `load` makes, in a process behind a pipe. A process that died or hung is started again.

    One thread watches the process and ends it where it must be ended, another loads a new one, both also while nobody
    asks. Whoever uses the pipe holds its lock. The process ends with the thread that started it, however that ends.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        hung_after_s: float = threading.TIMEOUT_MAX,
        stopped_after_s: float = threading.TIMEOUT_MAX,
    ):
        """load: called in the new process, so it must be picklable. Raises what it raises.

        hung_after_s: a forward that takes longer is ended with its process. stopped_after_s: so is a
        process that is stopped (SIGSTOP) for longer, whether or not it is asked anything.
        """
        self._load = load
        self._hung_after_s = hung_after_s
        self._stopped_after_s = stopped_after_s
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._busy_since: float | None = None
        self._stopped_since: float | None = None
        self._start()
        for work in (self._watch, self._keep_running):
            threading.Thread(target=work, name="engine-watch", daemon=True).start()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    @property
    def is_down(self) -> bool:
        """Whether the process cannot answer now: stopped, ended, or loading again. Any thread may ask."""
        return self._is_loading or self._stopped_since is not None or self._process.poll() is not None

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Outcome]:
        with self._talk():
            self._send(list(requests))
            outcomes, changed = self._receive()
        self._metadata = changed or self._metadata
        return outcomes

    def think(self, episode: str, request: ThoughtRequest | GenerationRequest | None = None) -> str | Thought | None:
        with self._talk():
            self._send((episode, request))
            return self._receive()

    def forget(self, episode: str) -> None:
        if self._process.poll() is None and not self._is_loading:  # a new process knows no episode
            with self._talk():
                self._send(episode)

    def end(self) -> None:
        """Kill the process; whoever waits for an answer or for a load gets an error at once. Any thread may call it."""
        self._closed.set()
        self._process.kill()

    def close(self) -> None:
        self.end()
        with self._lock:  # another may just be started, which ends at once
            self._end()

    @contextmanager
    def _talk(self) -> Iterator[None]:
        """The pipe for one exchange, with a process behind it."""
        with self._lock:
            if self._process.poll() is not None:
                self._restart()
            self._busy_since = monotonic()
            try:
                yield
            finally:
                self._busy_since = None

    def _start(self) -> None:
        self._is_loading = True
        try:
            self._open_pipe()
            try:
                if self._closed.is_set():
                    raise EngineError("the engine is closed")
                self._send(self._load)
                self.max_batch, self._metadata = self._receive()
            except BaseException:
                self._end()
                raise
        finally:
            self._is_loading = False

    def _open_pipe(self) -> None:
        """A new process at the other end, which has seen nothing."""
        self._parts = RepeatedParts()
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            # Its stdout is our stderr: ours has a reader who waits for one line.
            with deaf_children():
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()]
                )

    def _restart(self) -> None:
        logger.warning("the engine's process is started again")
        self._end()
        self._start()

    def _end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _is_stopped(self) -> bool:
        with suppress(psutil.Error):
            return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED
        return False

    def _watch(self) -> None:
        """End a process that has hung or is stopped."""
        while not self._closed.wait(_LOOK_EVERY_S):
            now, busy_since = monotonic(), self._busy_since
            self._stopped_since = (self._stopped_since or now) if self._is_stopped() else None
            if busy_since is not None and now - busy_since > self._hung_after_s:
                logger.error("the model has hung for %g s: its process is ended", self._hung_after_s)
                self._process.kill()
            elif self._stopped_since is not None and now - self._stopped_since > self._stopped_after_s:
                logger.error("the engine's process is stopped for %g s: it is ended", self._stopped_after_s)
                self._process.kill()

    def _keep_running(self) -> None:
        """Load another process where one has ended. The thread stays as long as the process that it started."""
        pause_s = _LOOK_EVERY_S
        while not self._closed.wait(pause_s):
            pause_s = _LOOK_EVERY_S if self._revive() else min(2 * pause_s, _RESTART_EVERY_S)

    def _revive(self) -> bool:
        """Start another process where one has ended and nobody else sees to it; False where it could not be loaded."""
        if self._process.poll() is None or not self._lock.acquire(blocking=False):
            return True
        try:
            if self._process.poll() is not None and not self._closed.is_set():
                self._restart()
        except Exception as error:
            logger.error("%s; it is tried again, later each time, and at the next request", error)
            return False
        finally:
            self._lock.release()
        return True

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send_bytes(self._parts.pack(message))
        except OSError:
            raise self._explain_end() from None

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._explain_end() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _explain_end(self) -> EngineError:
        self._process.kill()  # whatever is left of it cannot be talked to
        return EngineError(f"the engine's process ended with status {self._process.wait()}; it will be started again")


def main() -> None:
    """The other side. argv: the number of the pipe's file descriptor."""
    for name in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server says when it is the end
        signal.signal(name, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    start_logging("%(asctime)s %(levelname)s engine: %(message)s")
    with Connection(int(sys.argv[1])) as pipe, suppress(EOFError, OSError):  # where the server has ended
        _serve(pipe)


def _serve(pipe: Connection) -> None:
    """The first message is the function that loads the engine. Each later one is a list of requests to answer; a tuple,
    the arguments of `think`; or a text, the episode to forget, which has no answer.
    """
    parts = RepeatedParts()
    first = pipe.recv_bytes()
    try:
        with as_engine_error("loading the model failed"):
            engine = parts.unpack(first)()
    except VLMLocalError as error:
        return pipe.send(error)
    take_over_logging()
    pipe.send((engine.max_batch, metadata := engine.metadata))
    while True:
        message = parts.unpack(pipe.recv_bytes())
        if isinstance(message, str):
            engine.forget(message)
            continue
        try:
            with as_engine_error("the model failed"):
                if isinstance(message, tuple):
                    pipe.send(engine.think(*message))
                    continue
                outcomes, before, metadata = engine.generate(message), metadata, engine.metadata
                pipe.send((outcomes, None if metadata == before else metadata))
        except VLMLocalError as error:
            pipe.send(error)


if __name__ == "__main__":
    main()
