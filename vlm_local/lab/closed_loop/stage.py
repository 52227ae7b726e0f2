"""Environments in processes of their own: physics and pictures there, the policy here.

`Stage` is the near end of one such process and ends with its parent, also when that is killed. `Player` is the far
end; without a process it plays recorded episodes again.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_local.actions import GripperLatch, build_action
from vlm_local.errors import VLMLocalError
from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy import draw_uniform
from vlm_local.primitives import format_phrase, parse_phrase
from vlm_local.processes import shielded_children
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.oracle import Oracle
from vlm_local.types import Observation, Primitive


class StageError(VLMLocalError):
    """An environment's process died: no fault of the policy."""


@dataclass(frozen=True, eq=False)
class Scene:
    """What an environment shows after each step.

    oracle: the oracle's phrase for this state. wrong_instruction: asks for something else in the same scene.
    success, lost: the episode is over. stage: furthest of the task's stages, counted from 1.
    """

    observation: Observation
    wrong_instruction: str
    oracle: str
    success: bool = False
    lost: bool = False
    stage: int = 0


def apply_control(control: str, scene: Scene) -> Observation:
    """The observation that the policy is given.

    control: "none", "blank-image" (black) or "wrong-instruction" (asks for something else).
    """
    observation = scene.observation
    if control == "blank-image":
        return replace(observation, image=np.zeros_like(observation.image))
    if control == "wrong-instruction":
        return replace(observation, instruction=scene.wrong_instruction)
    return observation


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


class Player:
    """One environment at a time, with the oracle's phrase for each state. image_size: px, of square images.

    It keeps the environments of one task, as tasks are played one after another.
    """

    def __init__(self, level: str, image_size: int):
        self._level, self._image_size = level, image_size
        self._seen: SimEnv | None = None
        self._unseen: SimEnv | None = None
        self._phrases = load_phrase_grammar().sentences

    def reset(self, task: str, seed: int, drawn: bool) -> Scene:
        self._prepare(task)
        self._env = self._seen if drawn else self._unseen
        self._env.reset(seed=seed)
        self._oracle = Oracle(self._env)
        return self._build_scene({})

    def step(self, action: np.ndarray) -> Scene:
        *_, info = self._env.step(action)
        return self._build_scene(info)

    def count_oracle_steps(self, task: str, seed: int, max_steps: int) -> int | None:
        self._prepare(task)
        oracle = Oracle(self._unseen)
        return self._count_steps(seed, max_steps, lambda step: oracle.primitive())

    def count_random_steps(self, task: str, seed: int, max_steps: int) -> int | None:
        self._prepare(task)
        return self._count_steps(seed, max_steps, lambda step: parse_phrase(self._draw_phrase(seed, step)))

    def _prepare(self, task: str) -> None:
        if self._seen is None or self._seen.task.name != task:
            if self._seen is not None:
                self._seen.close()
            self._seen = SimEnv(task, self._level, self._image_size)
            self._unseen = SimEnv(task, self._level, None)

    def _build_scene(self, info: dict) -> Scene:
        outcome = {name: info[name] for name in ("success", "lost", "stage") if name in info}
        phrase = format_phrase(self._oracle.primitive())
        return Scene(self._env.observation, self._env.task.wrong_instruction, phrase, **outcome)

    def _draw_phrase(self, seed: int, step: int) -> str:
        return self._phrases[int(draw_uniform(seed, step) * len(self._phrases))]

    def _count_steps(self, seed: int, max_steps: int, choose: Callable[[int], Primitive]) -> int | None:
        """Control steps to success when `choose` answers each step, or None."""
        env, latch = self._unseen, GripperLatch()
        env.reset(seed=seed)
        for step in range(max_steps):
            primitive = choose(step)
            command = latch.update(primitive.gripper, env.world.opening)
            _, _, over, _, info = env.step(build_action(primitive, command))
            if over:
                return step + 1 if info["success"] else None
        return None


def replay_episode(player: Player, ended: Mapping[str, Any], lines: Sequence[Mapping], max_steps: int) -> dict:
    """Carry out the recorded actions of an episode again, from its seed, to see whether it ends as recorded.

    player: of the run's level. ended: the episode's meta.json. lines: of its steps.jsonl. Returns the fields of `ended`
    that follow from physics, with the oracle's and random phrases' steps on the same episode; `steps` ends where the
    episode does.
    """
    task, seed = ended["task"], ended["seed"]
    scene = player.reset(task, seed, drawn=False)
    instruction, steps, agreed = scene.observation.instruction, 0, 0
    for line in lines[:max_steps]:
        if scene.success or scene.lost:
            break
        agreed += line["phrase"] == scene.oracle
        scene, steps = player.step(np.array(line["action"], np.float64)), steps + 1
    outcome = "success" if scene.success else "lost" if scene.lost else "late"
    found = {
        "instruction": instruction,
        "outcome": outcome if scene.success or scene.lost or steps == max_steps else "unfinished",
        "steps": steps,
        "stage": scene.stage,
        "agreed": agreed,
        "oracle_steps": player.count_oracle_steps(task, seed, max_steps),
    }
    if "random_steps" in ended:
        found["random_steps"] = player.count_random_steps(task, seed, max_steps)
    return found
