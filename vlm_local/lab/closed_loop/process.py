"""An environment in a process of its own: physics and pictures there, the policy here.

The process ends with its parent, also when that is killed.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm_local.errors import VLMLocalError
from vlm_local.processes import shielded_children

if TYPE_CHECKING:
    from vlm_local.lab.closed_loop.environment import State


class EnvironmentDied(VLMLocalError):
    """An environment's process died: no fault of the policy."""


class EnvironmentProcess:
    """environment.Environment, over a pipe. Not thread-safe. Raises EnvironmentDied where the process died."""

    def __init__(self, suite: str, level: str, image_size: int):
        self.plays = (suite, level, image_size)
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, suite, level, image_size), daemon=True)
        with shielded_children():
            self._process.start()
        far_end.close()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def reset(self, task: str, seed: int, drawn: bool = True) -> "State":
        return self._ask("reset", task, seed, drawn)

    def step(self, action) -> "State":
        return self._ask("step", action)

    def count_steps(self, who: str, task: str, seed: int, max_steps: int) -> int | None:
        return self._ask("count_steps", who, task, seed, max_steps)

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _ask(self, name: str, *arguments) -> Any:
        try:
            self._pipe.send((name, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            raise EnvironmentDied(f"the simulator's process ended with status {status} (-9: out of memory?)") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


_idle: list[EnvironmentProcess] = []  # left by blocks that have ended
_idle_lock = threading.Lock()


@contextmanager
def borrow_environment(suite: str, level: str, image_size: int) -> Iterator[EnvironmentProcess]:
    """An environment's process for the block. A later block that plays the same gets it again, if it still lives."""
    with _idle_lock:
        _idle[:] = [each for each in _idle if each.is_alive]
        found = next((each for each in _idle if each.plays == (suite, level, image_size)), None)
        if found is not None:
            _idle.remove(found)
    environment = found or EnvironmentProcess(suite, level, image_size)
    try:
        yield environment
    except BaseException:
        environment.close()
        raise
    with _idle_lock:
        _idle.append(environment)


def _serve(pipe, suite: str, level: str, image_size: int) -> None:
    """In the process: answer until the other end is closed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded: many environments share the cores
    from vlm_local.lab.closed_loop.environment import Environment

    environment = Environment(suite, level, image_size)
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = getattr(environment, name)(*arguments)
        except Exception as error:  # raised where the question was asked
            answer = error
        pipe.send(answer)
