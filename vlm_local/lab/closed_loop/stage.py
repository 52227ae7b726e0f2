"""Environments in processes of their own: physics and pictures there, the policy here.

`Stage` is the near end of one such process. It ends with its parent, also when that is killed.
"""

import multiprocessing
import os
from dataclasses import dataclass
from typing import Any

from vlm_local.errors import VLMLocalError
from vlm_local.processes import shielded_children
from vlm_local.types import Observation


class StageError(VLMLocalError):
    """An environment's process died: no fault of the policy."""


@dataclass(frozen=True, eq=False)
class Scene:
    """What a stage shows after each step.

    oracle: the oracle's phrase for this state. wrong_instruction: asks for something else here.
    success, lost: the episode is over. stage: furthest of the task's stages, counted from 1.
    """

    observation: Observation
    wrong_instruction: str
    oracle: str
    success: bool = False
    lost: bool = False
    stage: int = 0


class Stage:
    """One environment process. Not thread-safe. Raises StageError where the process died."""

    def __init__(self, level: str, image_size: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_play, args=(far_end, level, image_size), daemon=True)
        with shielded_children():
            self._process.start()
        far_end.close()

    def reset(self, task: str, seed: int, drawn: bool = True) -> Scene:
        """drawn: with pictures; without, images are (0, 0, 3) and steps take a fifth of the time."""
        return self._ask("reset", task, seed, drawn)

    def step(self, action) -> Scene:
        return self._ask("step", action)

    def count_oracle_steps(self, task: str, seed: int, max_steps: int) -> int | None:
        """Steps to success of the oracle on this episode, None where it fails: the ceiling."""
        return self._ask("count_oracle_steps", task, seed, max_steps)

    def count_random_steps(self, task: str, seed: int, max_steps: int) -> int | None:
        """Steps to success of random phrases on this episode, None where they fail: the floor."""
        return self._ask("count_random_steps", task, seed, max_steps)

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
            raise StageError(f"the simulator's process ended with status {status} (-9: out of memory?)") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _play(pipe, level: str, image_size: int) -> None:
    """The far end: answers until the near end is closed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from vlm_local.lab.closed_loop.player import Player

    player = Player(level, image_size)
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = getattr(player, name)(*arguments)
        except Exception as error:  # whatever it is, it belongs to the near end
            answer = error
        pipe.send(answer)
