"""An engine in a process of its own: its forwards do not wait for the server's threads, nor these for it.

A forward is thousands of short calls into torch, and after each one Python's interpreter lock has to
be got back from whoever decodes a request, prepares a picture or writes a recording meanwhile.
"""

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from vlm_local.engines import Engine, Outcome, explained
from vlm_local.errors import EngineError, VLMLocalError
from vlm_local.libc import die_with_parent
from vlm_local.types import GenerationRequest

logger = logging.getLogger(__name__)


class EngineProcess:
    """The engine that `load` makes, on the other side of a pipe. A process that died or hung is started anew.

    Requests are prepared over there, too. The process ends with this object's thread, however that ends.
    """

    def __init__(self, load: Callable[[], Engine], hung_after_s: float = threading.TIMEOUT_MAX):
        """load: called in the new process, so it must be picklable. Raises what it raises.

        hung_after_s: a forward that takes longer is ended with its process.
        """
        self._load = load
        self._hung_after_s = hung_after_s
        self._start()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    def prepare(self, request: GenerationRequest) -> GenerationRequest:
        return request

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Outcome]:
        if self._process.poll() is not None:
            logger.warning("the engine's process is started again")
            self._start()
        watch = threading.Timer(self._hung_after_s, self._end_hung)
        watch.daemon = True  # or a server that is told to stop would wait for it
        watch.start()
        try:
            self._send(list(requests))
            outcomes, self._metadata = self._receive()
        finally:
            watch.cancel()
        return outcomes

    def forget(self, episode: str) -> None:
        if self._process.poll() is None:  # a new process knows no episode
            self._send(episode)

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            # Its stdout is our stderr: ours has a reader who waits for one line.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()])
        try:
            self._send(self._load)
            self.max_batch, self._metadata = self._receive()
        except BaseException:
            self.close()
            raise

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
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

    def _end_hung(self) -> None:
        logger.error("the model has hung for %g s: its process is ended", self._hung_after_s)
        self._process.kill()

    def _explain_end(self) -> EngineError:
        self._process.kill()  # whatever is left of it cannot be talked to
        return EngineError(f"the engine's process ended with status {self._process.wait()}; it will be started again")


def main() -> None:
    """The other side. argv: the number of the pipe's file descriptor."""
    for name in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server says when it is the end
        signal.signal(name, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    with Connection(int(sys.argv[1])) as pipe, suppress(EOFError, OSError):  # where the server has ended
        _serve(pipe)


def _serve(pipe: Connection) -> None:
    try:
        with explained("loading the model failed"):
            engine = pipe.recv()()
    except VLMLocalError as error:
        return pipe.send(error)
    pipe.send((engine.max_batch, engine.metadata))
    while True:
        message = pipe.recv()
        if isinstance(message, str):
            engine.forget(message)
            continue
        try:
            with explained("the model failed"):
                pipe.send((_answer(engine, message), engine.metadata))
        except VLMLocalError as error:
            pipe.send(error)


def _answer(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Outcome]:
    prepared = [_prepare(engine, request) for request in requests]
    ready = [each for each in prepared if not isinstance(each, VLMLocalError)]
    generations = iter(engine.generate(ready) if ready else ())
    return [each if isinstance(each, VLMLocalError) else next(generations) for each in prepared]


def _prepare(engine: Engine, request: GenerationRequest) -> Any:
    try:
        with explained("the request could not be prepared"):
            return engine.prepare(request)
    except VLMLocalError as error:
        return error


if __name__ == "__main__":
    main()
