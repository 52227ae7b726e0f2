"""Frames from the simulator with the oracle's answers to every question that fits what is seen.

A shard is a function of its seed, its tasks and the learner's weights. Behaviour mixes the oracle,
random phrases and the learner; labels are always the oracle's (DAgger, Ross et al., 2011).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_local.actions import GripperLatch, build_action
from vlm_local.primitives import parse_phrase
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.levels import find_level
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
# Frames at most that show the task done, where right is "stop" or what little is left. Not where that is seen too
# poorly, as between fingers and a block: a stop that comes too early never ends.
_AFTER_SUCCESS = {"open_drawer": 4, "eggplant_in_basket": 4, "eggplant_in_sink": 4}
# Steps of the oracle at most before the first frame: about as many as it needs.
_UNSEEN_STEPS = {
    "reach": 12,
    "reach_relation": 12,
    "push": 20,
    "lift": 20,
    "open_drawer": 20,
    "close_drawer": 20,
    "eggplant_in_basket": 45,
    "eggplant_in_sink": 45,
    "reach_shown": 12,
    "put_back": 20,
}

_ARRAYS = ("frames", "proprio", "firsts", "episode")

Actor = Callable[[Observation], Primitive]


@dataclass(frozen=True, eq=False)
class Shard:
    """frames: uint8 (N, P, P, 3). proprio: float32 (N, 7). questions: N lists.

    firsts: uint8 (E, P, P, 3), the first picture of each episode. episode: int64 (N,), which one a frame is of.
    """

    frames: np.ndarray
    proprio: np.ndarray
    questions: list[list[Question]]
    firsts: np.ndarray
    episode: np.ndarray


def collect(
    tasks: Mapping[str, float],
    levels: Mapping[str, float],
    num_frames: int,
    image_px: int,
    seed: Sequence[int],
    learner: Actor | None,
) -> Shard:
    """tasks, levels: name -> share of the scenes. learner: who acts in half of the scenes, where given.

    The learner is also asked about each episode's first observation, at step 0, so that it can remember it.
    """
    rng = np.random.default_rng(seed)
    frames, proprio, questions, firsts, episode = [], [], [], [], []
    with ExitStack() as stack:
        envs = {name: stack.enter_context(closing(SimEnv(name, image_size=_RENDER_PX))) for name in tasks}
        while len(frames) < num_frames:
            env = envs[_draw_name(tasks, rng)]
            env.level = find_level(_draw_name(levels, rng))
            actor = learner if rng.random() < 0.5 else None
            env.reset(seed=int(rng.integers(2**63)))
            firsts.append(shrink(env.observation.image, image_px))
            if actor is not None:
                actor(env.observation)
            for observation, asked in _play(env, rng, actor):
                episode.append(len(firsts) - 1)
                frames.append(shrink(observation.image, image_px))
                proprio.append(observation.proprio)
                questions.append(asked)
    frames, proprio, questions, episode = (each[:num_frames] for each in (frames, proprio, questions, episode))
    return Shard(np.stack(frames), np.array(proprio, np.float32), questions, np.stack(firsts), np.array(episode))


def _draw_name(shares: Mapping[str, float], rng: np.random.Generator) -> str:
    weights = np.array(list(shares.values()))
    return list(shares)[rng.choice(len(weights), p=weights / weights.sum())]


def shrink(image: np.ndarray, image_px: int) -> np.ndarray:
    """As Qwen2-VL's image processor does it."""
    return np.asarray(Image.fromarray(image).resize((image_px, image_px), Image.Resampling.BICUBIC))


def _play(env: SimEnv, rng: np.random.Generator, learner: Actor | None):
    """One scene, in half of the cases from somewhere on its way: yields (observation, questions) of every step.

    What a cue shows is not asked about while it is shown: the arm waits, whatever is said.
    """
    latch = GripperLatch()
    for _ in range(env.task.cue_steps):
        env.step(_STILL)
    if rng.random() < _TELEPORT and env.task.kind == "blocks":
        env.world.put_arm(rng.uniform(*_ANYWHERE_M))
        env.step(_STILL)
    elif rng.random() < 0.5 and _advance(env, latch, int(rng.integers(_UNSEEN_STEPS[env.task.name]))):
        return
    left, noise, done = 0, Primitive(), 0
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
        info = _step(env, latch, primitive)
        done += info["success"]
        if info["lost"] or done > _AFTER_SUCCESS.get(env.task.name, 0):
            return


def _advance(env: SimEnv, latch: GripperLatch, num_steps: int) -> bool:
    """Let the oracle move; whether the episode is lost. Most of it is not drawn: that takes four times as long."""
    oracle = Oracle(env)
    for _ in range(num_steps):
        primitive = oracle.primitive()
        env.world.step(build_action(primitive, latch.update(primitive.gripper, env.world.proprio[6])))
    info = _step(env, latch, oracle.primitive())
    return info["lost"]


def _step(env: SimEnv, latch: GripperLatch, primitive: Primitive) -> dict[str, Any]:
    """The environment's `info`."""
    return env.step(build_action(primitive, latch.update(primitive.gripper, env.world.proprio[6])))[-1]


def _draw_noise(rng: np.random.Generator) -> Primitive:
    """Mostly moves; a turn or a gripper word now and then."""
    move = rng.integers(-1, 2, 3)
    turn = rng.integers(-1, 2, 3) * (rng.random(3) < (0.1, 0.15, 0.1))
    return Primitive(*move.tolist(), *turn.tolist())


def save_shard(shard: Shard, path: Path) -> None:
    texts = [
        [(q.task, q.names, q.instruction, q.phrase, q.slot, q.offset_m) for q in asked] for asked in shard.questions
    ]
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        arrays = {name: getattr(shard, name) for name in _ARRAYS}
        np.savez(file, questions=np.array(json.dumps(texts)), **arrays)
    partial.replace(path)


def load_shard(path: Path) -> Shard:
    with np.load(path) as arrays:
        texts = json.loads(str(arrays["questions"]))
        questions = [[_build_question(*fields) for fields in asked] for asked in texts]
        return Shard(questions=questions, **{name: arrays[name] for name in _ARRAYS})


def _build_question(*fields: Any) -> Question:
    """JSON made a list of the offset."""
    *others, offset_m = fields
    return Question(*others, offset_m=tuple(offset_m))
