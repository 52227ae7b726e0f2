"""The episodes of a tuning: which can be scored, which are held out, and what a policy says to the steps of one."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np

from vlm_local.errors import ConfigError, DataError, EngineError
from vlm_local.policy import Policy, derive_seed
from vlm_local.primitives import label_episode, parse_phrase
from vlm_local.types import Episode, Observation, Primitive

DEVELOPMENT, HELD_OUT = "development", "held_out"
MIN_DEVELOPMENT = 6  # fewer cannot be told from chance: p of a permutation test is at least 1/64 for them
MIN_EPISODES = 9
MIN_PROBABILITY = 1e-9  # of a label; smaller ones count as this, so that a single step cannot decide
MAX_TIMED = 24  # steps

_read_signs = cache(parse_phrase)


@dataclass(frozen=True)
class Split:
    """Numbers of episodes, in reading order. num_steps: number of an episode -> how many of its steps are asked."""

    development: Sequence[int]
    held_out: Sequence[int]
    num_steps: Mapping[int, int]
    left_out: Sequence[str]

    def count_steps(self, part: str) -> int:
        return sum(self.num_steps[number] for number in getattr(self, part))


def split_episodes(episodes: Iterable[Episode], every: int, seed: int, left_out: Sequence[str]) -> Split:
    """Every third of the episodes that can be scored is held out, in an order that a hash of seed and number gives.

    Looks at no picture. left_out: why records could not be read. Raises DataError for too few episodes.
    """
    num_steps, reasons = {}, list(left_out)
    for episode in episodes:
        try:
            label_episode(episode.states)
            num_steps[episode.index] = len(list_steps(episode, every))
        except DataError as error:
            reasons.append(f"{episode.source}: {error}")
    if not num_steps:
        told = f": {reasons[0]}" if reasons else ""
        raise DataError(f"no episode has labels, so there is nothing to tune by{told}")
    if len(num_steps) < MIN_EPISODES:
        raise DataError(
            f"{len(num_steps)} episodes can be scored, and `tune` needs {MIN_EPISODES}: {MIN_DEVELOPMENT} to choose "
            "by, as no difference on fewer can be told from chance, and others to score the choice on"
        )
    order = sorted(num_steps, key=lambda number: derive_seed(seed, "tune", number))
    num_held_out = len(order) // 3
    return Split(sorted(order[num_held_out:]), sorted(order[:num_held_out]), num_steps, reasons)


def list_steps(episode: Episode, every: int) -> list[int]:
    """Those that are asked. Raises DataError where no step has an instruction."""
    steps = [step for step in range(0, len(episode), every) if episode.instruction_at(step)]
    if not steps:
        raise DataError("the episode has no instruction, so nobody can be asked")
    return steps


def score_episode(policy: Policy, episode: Episode, every: int, seed: int) -> dict[str, Any]:
    """Of the steps that are asked: "steps", their "log_loss" (of the label's direction, natural logarithm) and "right".

    A step whose picture cannot be read is left out. Raises ConfigError for a policy without probabilities.
    """
    labels, _ = label_episode(episode.states)
    steps, losses, right = [], [], []
    for step, observation in _observe(policy, episode, list_steps(episode, every), seed):
        decision = policy.act(observation)
        if decision.fault or decision.phrase is None:
            raise EngineError(f"{episode.source}, step {step}: {decision.fault or 'the policy said no phrase'}")
        if decision.probabilities is None:
            raise ConfigError("the model tells no probabilities of all phrases")
        steps.append(step)
        losses.append(measure_log_loss(decision.probabilities, labels[step]))
        right.append(_read_signs(decision.phrase) == labels[step])
    return {"steps": steps, "log_loss": losses, "right": right}


def measure_log_loss(probabilities: Mapping[str, float], label: Primitive) -> float:
    """-log of the probability of all phrases that mean the label: with "slightly" there are two."""
    meant = sum(told for phrase, told in probabilities.items() if _read_signs(phrase) == label)
    return -math.log(max(meant, MIN_PROBABILITY))


def time_steps(policies: Sequence[Policy], episodes: Iterable[Episode], seed: int) -> list[list[float]]:
    """Milliseconds of each policy's answers to the same consecutive steps, each step asked of all in turns.

    Of as many episodes as MAX_TIMED steps take, each without its first step, which reads what is kept from then on.
    """
    durations: list[list[float]] = [[] for _ in policies]
    places = list(range(len(policies)))
    for episode in episodes:
        first, *others = list_steps(episode, 1)
        told = episode.instruction_at(first)
        steps = [first, *(step for step in others if episode.instruction_at(step) == told)]
        for policy in policies[1:]:
            policy.reset(derive_seed(seed, "tune", episode.index))
        for count, (_, observation) in enumerate(_observe(policies[0], episode, steps, seed)):
            for place in places:
                start = perf_counter()
                policies[place].act(observation)
                took = round(1e3 * (perf_counter() - start), 3)
                durations[place] += [took] * (count > 0)
            places.reverse()
            if len(durations[0]) == MAX_TIMED:
                return durations
    return durations


def _observe(policy: Policy, episode: Episode, steps: Sequence[int], seed: int) -> Iterator[tuple[int, Observation]]:
    """(step, what is seen) of an episode that begins for this policy; a new instruction begins another one."""
    told = ""
    for step in steps:
        if episode.instruction_at(step) != told:
            told = episode.instruction_at(step)
            policy.reset(derive_seed(seed, "tune", episode.index))
        try:
            image = episode.load_image(step)
        except DataError:
            continue
        yield step, Observation(image, told, episode.states[step].astype(np.float64), step)
    policy.reset(0)  # lets go of what is kept of the last episode
