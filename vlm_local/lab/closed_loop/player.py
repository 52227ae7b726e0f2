"""What runs in an environment's process: episodes with pictures, their ceiling and floor without."""

import numpy as np

from vlm_local.actions import GripperLatch, build_action
from vlm_local.grammar import load_phrase_grammar
from vlm_local.lab.closed_loop.stage import Scene
from vlm_local.policy import draw_uniform
from vlm_local.primitives import format_phrase, parse_phrase
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.oracle import Oracle


class Player:
    """Answers stage.Stage. Keeps the environments of one task, as tasks are played one after another."""

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

    def _count_steps(self, seed: int, max_steps: int, choose) -> int | None:
        """Steps to success with what `choose` says at each step, or None."""
        env, latch = self._unseen, GripperLatch()
        env.reset(seed=seed)
        for step in range(max_steps):
            primitive = choose(step)
            command = latch.update(primitive.gripper, env.world.opening)
            _, _, over, _, info = env.step(build_action(primitive, command))
            if over:
                return step + 1 if info["success"] else None
        return None
