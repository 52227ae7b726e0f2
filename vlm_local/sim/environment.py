"""SimEnv: the simulator behind gymnasium's interface, with the wire's observation and action.

    env = SimEnv("reach", level="normal", image_size=256)
    observation, info = env.reset(seed=7)           # the same seed, the same episode, everywhere
    observation, reward, terminated, truncated, info = env.step(action)
    env.observation                                  # the same as types.Observation
    Oracle(env).primitive()                          # what to do now (sim/oracle.py)

observation: {"image": uint8 (S, S, 3) RGB, "instruction": str, "proprio": float64 (7,)} as in
types.Observation. action: (7,) as in types.Decision, at 5 Hz. reward is 1 on the step that succeeds,
else 0; terminated on success, or when success is out of the question; truncated never: the length
of an episode is the caller's. info: `success`, `lost`, `stage` (the furthest so far, an index into
`env.task.stages` counted from 1, 0 for none) and `step`.
"""

import zlib
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

from vlm_local.actions import check_action
from vlm_local.sim.levels import find_level, vary_surroundings
from vlm_local.sim.rendering import Camera
from vlm_local.sim.scene import CAMERA
from vlm_local.sim.tasks import find_task
from vlm_local.sim.world import World
from vlm_local.types import Observation


class SimEnv(gymnasium.Env):
    """One task at one level. Not thread-safe; deterministic for a seed.

    image_size: pixels a side; None draws nothing (images are (0, 0, 3)) and needs no OpenGL.
    Raises ConfigError for an unknown task or level, and where no picture can be drawn.
    """

    metadata: ClassVar[dict[str, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]: as gymnasium's own
        "render_modes": ["rgb_array"],
        "render_fps": 5,
    }
    render_mode = "rgb_array"

    def __init__(self, task: str, level: str = "normal", image_size: int | None = 256):
        self.task = find_task(task)()
        self.level = find_level(level)
        self.world = World(self.task.kind)
        self.image_size = image_size or 0
        self._camera: Camera | None = None
        size = self.image_size
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (size, size, 3), np.uint8),
                "instruction": spaces.Text(256, charset=frozenset(map(chr, range(32, 127)))),
                "proprio": spaces.Box(-np.inf, np.inf, (7,), np.float64),
            }
        )
        limit = np.array([0.05, 0.05, 0.05, 0.5, 0.5, 0.5])  # m and rad per control step
        self._box = spaces.Box(np.append(-limit, 0.0), np.append(limit, 1.0), dtype=np.float64)
        self.action_space = self._box

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start the episode of this seed (0 <= seed < 2**64); without one, the next random episode."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**63))
        rng = np.random.default_rng([seed, zlib.crc32(self.task.name.encode())])
        self.world.clear()
        vary_surroundings(self.world.model, self.level, rng)
        self.task.sample(self.world, self.level, rng)
        self._step, self._stage = 0, 0
        return self._observe(), self._describe(False, False)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Move for one control step of 0.2 s. Raises ConfigError unless `action` is 7 finite numbers."""
        action = check_action(action)
        if not self._shows_cue:  # the arm waits
            self.world.step(np.clip(action, self._box.low, self._box.high))
        return self.judge()

    def judge(self) -> tuple[dict, float, bool, bool, dict]:
        """What `step` returns, of the world as it is now: for who moves the arm by other means, a step at a time."""
        self._step += 1
        success = self.task.is_done(self.world)
        lost = not success and self.task.is_lost(self.world)
        self._stage = max(self._stage, self.task.count_stages(self.world))
        return self._observe(), float(success), success or lost, False, self._describe(success, lost)

    @property
    def observation(self) -> Observation:
        """The present as types.Observation."""
        return Observation(self._image, self.task.instruction, self.world.proprio.copy(), self._step)

    def render(self) -> np.ndarray:
        """uint8 (S, S, 3) RGB of the present."""
        return self._image

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    def _observe(self) -> dict[str, Any]:
        if self.image_size and self._camera is None:
            self._camera = Camera(self.world.model, CAMERA, self.image_size)
        self._image = self._draw(self._camera) if self._camera else np.zeros((0, 0, 3), np.uint8)
        observation = self.observation
        return {"image": observation.image, "instruction": observation.instruction, "proprio": observation.proprio}

    @property
    def _shows_cue(self) -> bool:
        return self._step < self.task.cue_steps

    def _draw(self, camera: Camera) -> np.ndarray:
        if not self._shows_cue:
            return camera.render(self.world.data)
        with self.world.pretend():
            self.task.show_cue(self.world)
            self.world.observe()
            return camera.render(self.world.data)

    def _describe(self, success: bool, lost: bool) -> dict[str, Any]:
        return {"success": success, "lost": lost, "stage": self._stage, "step": self._step}
