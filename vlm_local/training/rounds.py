"""What happens beside the training process: collecting a round's frames, playing rollouts."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_local.assembly import open_policies
from vlm_local.policy import Policy
from vlm_local.policy_options import PolicyOptions
from vlm_local.primitives import parse_phrase
from vlm_local.sim.environment import SimEnv
from vlm_local.training.collect import Actor, collect, save_shard
from vlm_local.types import Observation, Primitive

_MAX_STEPS = 70  # AutoEval's limit
_FIRST_SEED = 1_000_000  # of rollouts while training; results of the model card use others


@dataclass(frozen=True)
class RoundSpec:
    """One round to collect. student: folder of the model that acts, or None."""

    number: int
    tasks: Mapping[str, float]
    levels: Mapping[str, float]
    frames: int
    image_px: int
    seed: int
    student: Path | None


def collect_round(spec: RoundSpec, path: Path) -> Path:
    """Write a round's shard, unless a run before this one did."""
    if not path.exists():
        with _open_actor(spec.student) as actor:
            seed = (spec.seed, spec.number)
            shard = collect(spec.tasks, spec.levels, spec.frames, spec.image_px, seed, actor)
        save_shard(shard, path)
    return path


def measure_round(student: Path, tasks: tuple[str, ...], level: str, num_episodes: int) -> dict[str, float]:
    """Share of successful rollouts a task, decided as the student's sidecar says."""
    _use_one_thread()
    with open_student(student) as policy:
        return {f"success {task}": _play(policy, task, level, num_episodes) / num_episodes for task in tasks}


def _play(policy: Policy, task: str, level: str, num_episodes: int) -> int:
    successes = 0
    with closing(SimEnv(task, level)) as env:
        for seed in range(_FIRST_SEED, _FIRST_SEED + num_episodes):
            env.reset(seed=seed)
            policy.reset(seed)
            info: dict[str, Any] = {"success": False}
            for _ in range(_MAX_STEPS):
                *_, ended, _, info = env.step(policy.act(env.observation).action)
                if ended:
                    break
            successes += info["success"]
    return successes


def _use_one_thread() -> None:
    import torch  # two seconds, which a round without a student does without

    torch.set_num_threads(1)


@contextmanager
def _open_actor(folder: Path | None) -> Iterator[Actor | None]:
    """None for no student."""
    if folder is None:
        yield None
        return
    _use_one_thread()
    with open_student(folder) as policy:

        def act(observation: Observation) -> Primitive:
            if observation.step == 0:
                policy.reset(0)
            return parse_phrase(policy.act(observation).phrase or "")

        yield act


@contextmanager
def open_student(folder: Path) -> Iterator[Policy]:
    """A model folder through the door of every other command; its engine ends with the block."""
    policies = open_policies(PolicyOptions(model=str(folder), offline=True))
    try:
        yield policies.build("student")
    finally:
        policies.close()
