"""What a step costs while thoughts are written between steps: a robot that keeps its rhythm, with and without."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import monotonic, perf_counter, sleep
from typing import Any

import numpy as np

from vlm_local.bench import Measured
from vlm_local.bench.subject import draw_observation, summarise_ms
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import ConfigError
from vlm_local.policy import Policy
from vlm_local.policy_options import PolicyOptions
from vlm_local.progress import open_bar
from vlm_local.resolved_options import ResolvedOptions

_WARM_UP = 3  # steps of each episode: the first reads the whole prompt, and a robot's rhythm must be known
_DEFAULT = "ecot"
_NO_THINKING = {"think": None, "think_every": None, "think_tokens": None}


@dataclass
class _Told:
    """Of the timed steps of one kind. ms: of `act`. queue_ms: until the engine began. ages: of the reasoning shown."""

    ms: list[float] = field(default_factory=list)
    queue_ms: list[float] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    thought_ms: dict[tuple[int, int], float] = field(default_factory=dict)  # by (round, step that it is about)

    def add(self, taken_ms: float, decision_ms: Mapping[str, float], extra: Mapping[str, Any], number: int) -> None:
        self.ms.append(taken_ms)
        self.queue_ms.append(decision_ms["queue"])
        if extra.get("reasoning"):
            self.ages.append(extra["reasoning_age"])
            self.thought_ms[number, extra["reasoning_step"]] = extra["reasoning_ms"]


def measure(options: PolicyOptions, hz: float, rounds: int, num_steps: int) -> Measured:
    """Play `rounds` episodes of `num_steps` steps at `hz` of each kind, in turns, on one engine as `serve` has it.

    The prompt's text, phrase and rhythm are the same; the pictures are noise. Raises
    ConfigError for a model that is not here or cannot think.
    """
    thinks = ResolvedOptions(replace(options, think=options.think or _DEFAULT), between_steps=True)
    if thinks.checkpoint is None:
        raise ConfigError("this benchmark needs a model whose weights are here: --model NAME|FOLDER")
    plain = ResolvedOptions(replace(options, **_NO_THINKING))
    warm_up = thinks.build_warm_up(), thinks.build_warm_thought()
    told: dict[str, _Told] = defaultdict(_Told)
    with closing(EngineWorker(thinks.load_apart, options.deadline_ms, *warm_up)) as worker:
        worker.wait_loaded()
        parts = {"without": plain, "with": thinks}
        policies = {name: each.build_policy(name, worker, {}, tell_all=False) for name, each in parts.items()}
        with open_bar("think", 2 * rounds, "episode") as bar:
            for number in range(rounds):
                for name in sorted(policies, reverse=bool(number % 2)):  # each comes first as often
                    _play(policies[name], told[name], hz, num_steps, number)
                    bar.update()
        about = dict(worker.metadata)
    result = _summarise(told["with"], told["without"])
    lines = [
        f"{name:8} p50 {times['p50']:8.2f} ms   p99 {times['p99']:8.2f} ms   waited p99 "
        f"{result['queue_ms'][name]['p99']:7.3f} ms"
        for name, times in result["ms"].items()
    ]
    lines.append(
        f"p99 with / without: {result['p99_ratio']}   p50: {result['p50_ratio']}   thoughts: {result['thoughts']}"
    )
    shown = {name: about.get(name) for name in ("model", "checkpoint_sha256", "dtype", "device", "trained")}
    made = {"think": thinks.metadata["think"], "hz": hz, "rounds": rounds, "steps": num_steps}
    return lines, {"benchmark": "think", **shown, **made, **result}


def _play(policy: Policy, told: _Told, hz: float, num_steps: int, number: int) -> None:
    """One episode in the robot's rhythm."""
    policy.reset(number)
    generator = np.random.default_rng(number)
    due = monotonic()
    for step in range(_WARM_UP + num_steps):
        observation = draw_observation(generator, step)
        sleep(max(0.0, due - monotonic()))
        start = perf_counter()
        decision = policy.act(observation)
        taken_ms = 1e3 * (perf_counter() - start)
        due = max(due + 1 / hz, monotonic())
        if step >= _WARM_UP:
            told.add(taken_ms, decision.timings_ms, decision.extra, number)
    policy.reset(number)  # or a thought would go on beside the other kind


def _summarise(thinking: _Told, plain: _Told) -> dict[str, Any]:
    ratios = {f"p{share}": np.percentile(thinking.ms, share) / np.percentile(plain.ms, share) for share in (50, 99)}
    return {
        "ms": {"without": summarise_ms(plain.ms), "with": summarise_ms(thinking.ms)},
        "queue_ms": {"without": summarise_ms(plain.queue_ms), "with": summarise_ms(thinking.queue_ms)},
        **{f"{name}_ratio": round(float(ratio), 3) for name, ratio in ratios.items()},
        "thoughts": len(thinking.thought_ms),
        "thought_ms": round(float(np.median(list(thinking.thought_ms.values()))), 1) if thinking.thought_ms else None,
        "steps_with_reasoning": round(len(thinking.ages) / len(thinking.ms), 3),
        "age_steps": round(float(np.mean(thinking.ages)), 2) if thinking.ages else None,
    }
