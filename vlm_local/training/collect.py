"""Frames from the simulator with the oracle's answers to every question that fits what is seen.

A shard is a function of its seed, its tasks and the learner's weights. Behaviour mixes the oracle,
random phrases and the learner; labels are always the oracle's (DAgger, Ross et al., 2011).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_local.actions import GripperLatch, build_action
from vlm_local.primitives import parse_phrase
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.oracle import Oracle
from vlm_local.training.questions import Question, list_questions
from vlm_local.types import Observation, Primitive

_RENDER_PX = 256  # what the wire shows; frames are kept as the model's processor shrinks them
_NOISE = 0.12  # chance a step to begin a stretch of random phrases
_STRETCH = 4  # its longest length, steps
_TELEPORT = 0.4  # share of scenes that begin anywhere instead of at the start
_ANYWHERE_M = np.array([[0.20, -0.17, 0.06], [0.40, 0.17, 0.115]])  # all of it within reach
_STILL = np.array([0, 0, 0, 0, 0, 0, 1.0])
_SCENE_STEPS = 16  # frames of one scene on average
_UNSEEN_STEPS = {"blocks": 12, "drawer": 20, "sink": 45}  # of the oracle at most, before the first frame

Actor = Callable[[Observation], Primitive]


@dataclass(frozen=True, eq=False)
class Shard:
    """frames: uint8 (N, P, P, 3). proprio: float32 (N, 7). questions: N lists."""

    frames: np.ndarray
    proprio: np.ndarray
    questions: list[list[Question]]


def collect(
    tasks: Mapping[str, float], level: str, num_frames: int, image_px: int, seed: Sequence[int], learner: Actor | None
) -> Shard:
    """tasks: name -> share of the scenes. learner: who acts in half of the scenes, where given."""
    rng = np.random.default_rng(seed)
    shares = np.array(list(tasks.values())) / sum(tasks.values())
    frames, proprio, questions = [], [], []
    with ExitStack() as stack:
        envs = [stack.enter_context(closing(SimEnv(name, level, _RENDER_PX))) for name in tasks]
        while len(frames) < num_frames:
            env = envs[rng.choice(len(shares), p=shares)]
            for observation, asked in _play(env, rng, learner if rng.random() < 0.5 else None):
                frames.append(shrink(observation.image, image_px))
                proprio.append(observation.proprio)
                questions.append(asked)
    return Shard(np.stack(frames[:num_frames]), np.array(proprio[:num_frames], np.float32), questions[:num_frames])


def shrink(image: np.ndarray, image_px: int) -> np.ndarray:
    """As Qwen2-VL's image processor does it."""
    return np.asarray(Image.fromarray(image).resize((image_px, image_px), Image.Resampling.BICUBIC))


def _play(env: SimEnv, rng: np.random.Generator, learner: Actor | None):
    """One scene, in half of the cases from somewhere on its way: yields (observation, questions) of every step."""
    env.reset(seed=int(rng.integers(2**63)))
    latch = GripperLatch()
    if rng.random() < _TELEPORT and env.task.kind == "blocks":
        env.world.put_arm(rng.uniform(*_ANYWHERE_M))
        env.step(_STILL)
    elif rng.random() < 0.5 and _advance(env, latch, int(rng.integers(_UNSEEN_STEPS[env.task.kind]))):
        return
    left, noise = 0, Primitive()
    num_steps = 1 + rng.poisson(_SCENE_STEPS - 1)
    for _ in range(num_steps):
        observation = env.observation
        asked = list_questions(env, rng)
        yield observation, asked
        if not left and rng.random() < _NOISE:
            left, noise = int(rng.integers(1, _STRETCH + 1)), _draw_noise(rng)
        if left:
            left, primitive = left - 1, noise
        elif learner is not None:
            primitive = learner(observation)
        else:
            primitive = parse_phrase(asked[0].phrase)
        if _step(env, latch, primitive):
            return


def _advance(env: SimEnv, latch: GripperLatch, num_steps: int) -> bool:
    """Let the oracle move; whether the episode ended. Most of it is not drawn: that takes four times as long."""
    oracle = Oracle(env)
    for _ in range(num_steps):
        primitive = oracle.primitive()
        env.world.step(build_action(primitive, latch.update(primitive.gripper, env.world.proprio[6])))
    return _step(env, latch, oracle.primitive())


def _step(env: SimEnv, latch: GripperLatch, primitive: Primitive) -> bool:
    """Whether the episode ended."""
    *_, ended, _, _ = env.step(build_action(primitive, latch.update(primitive.gripper, env.world.proprio[6])))
    return ended


def _draw_noise(rng: np.random.Generator) -> Primitive:
    """Mostly moves; a turn or a gripper word now and then."""
    move = rng.integers(-1, 2, 3)
    turn = rng.integers(-1, 2, 3) * (rng.random(3) < (0.1, 0.15, 0.1))
    return Primitive(*move.tolist(), *turn.tolist())


def save_shard(shard: Shard, path: Path) -> None:
    texts = [[(q.instruction, q.phrase, q.slot, q.offset_m) for q in asked] for asked in shard.questions]
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, frames=shard.frames, proprio=shard.proprio, questions=np.array(json.dumps(texts)))
    partial.replace(path)


def load_shard(path: Path) -> Shard:
    with np.load(path) as arrays:
        texts = json.loads(str(arrays["questions"]))
        questions = [
            [Question(instruction, phrase, slot, tuple(offset_m)) for instruction, phrase, slot, offset_m in asked]
            for asked in texts
        ]
        return Shard(arrays["frames"], arrays["proprio"], questions)
