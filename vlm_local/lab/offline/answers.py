"""Answers to the steps of a recorded episode, as fields of rows: from a policy, or from the labels."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from vlm_local.actions import OPEN_THRESHOLD
from vlm_local.errors import DataError, EngineError, RequestError
from vlm_local.lab.offline.baselines import answer_baseline, derive_episode_seed
from vlm_local.policy import Policy
from vlm_local.primitives import TRANSITIONS, format_phrase, label_window
from vlm_local.types import Decision, Episode, Observation

_MAX_FAULTS_IN_A_ROW = 3
_DECIMALS = 6

Fields = dict[str, Any]


class Answerer(Protocol):
    """Answers one episode at a time."""

    def answer(
        self, episode: Episode, labels: Sequence[str], steps: Sequence[int], unscored: dict[int, str]
    ) -> Iterator[tuple[int, Fields]]:
        """(step, fields of its row) of `steps` in order; those that cannot be asked go to `unscored`."""
        ...


class BaselineAnswerer:
    """One of baselines.NAMES."""

    def __init__(self, name: str, majority: str, seed: int):
        self._name, self._majority, self._seed = name, majority, seed

    def answer(self, episode, labels, steps, unscored):
        phrases = answer_baseline(
            self._name,
            [(episode.index, step) for step in steps],
            [labels[step] for step in steps],
            [labels[step - 1] if step else None for step in steps],
            self._majority,
            self._seed,
        )
        for step, phrase in zip(steps, phrases, strict=True):
            yield step, {"phrase": phrase, "phrase_source": "phrase"}


class PolicyAnswerer:
    """A policy. One that says phrases is asked at `steps`; one that only acts also at the steps around.

    Its first answer tells which of them it is. A policy that fails has given no answer (`phrase`
    null, `fault` says why), which is not exact; after three failures in a row it is taken for broken
    and EngineError is raised.
    """

    def __init__(self, policy: Policy, seed: int):
        self._policy, self._seed = policy, seed
        self._faults = 0
        self._says_phrases: bool | None = None  # None before its first answer
        self._instruction = ""
        self.durations_ms: list[float] = []

    def answer(self, episode, labels, steps, unscored):
        self._begin(episode, episode.instruction)
        decisions = self._find_kind(episode, steps, unscored) if self._says_phrases is None else {}
        if self._says_phrases is False:
            failed = {step: decision for step, decision in decisions.items() if decision.fault}
            if failed:  # begin again, so that it is asked in the order of the steps
                self._begin(episode, episode.instruction)
            yield from self._answer_by_actions(episode, steps, unscored, failed or decisions)
            return
        for step in steps:
            decision = decisions.get(step)
            if decision is None and step not in unscored:
                decision = self._ask(episode, step, unscored)
            if decision is not None:
                yield step, self._describe_phrase(decision)

    def _find_kind(self, episode: Episode, steps: Sequence[int], unscored: dict[int, str]) -> dict[int, Decision]:
        """Ask until the first answer; returns the decisions up to it. After a failure the kind is still unknown."""
        decisions: dict[int, Decision] = {}
        for step in steps:
            decision = self._ask(episode, step, unscored)
            if decision is None:
                continue
            decisions[step] = decision
            if decision.fault is None:
                self._says_phrases = decision.phrase is not None
                break
        return decisions

    @staticmethod
    def _describe_phrase(decision: Decision) -> Fields:
        if decision.phrase is None and decision.fault is None:
            decision = replace(decision, fault="the policy said no phrase, though it said some before")
        return _describe(decision, None if decision.fault else decision.phrase, "phrase")

    def _begin(self, episode: Episode, instruction: str) -> None:
        self._policy.reset(derive_episode_seed(self._seed, episode.index))
        self._instruction = instruction

    def _ask(self, episode: Episode, step: int, unscored: dict[int, str]) -> Decision | None:
        """None where there is no instruction, or the frame cannot be read."""
        instruction = episode.instruction_at(step)
        if not instruction:
            unscored[step] = f"{episode.source}, step {step}: the step has no instruction"
            return None
        if instruction != self._instruction:  # a server begins a new episode then, too
            self._begin(episode, instruction)
        try:
            image = episode.load_image(step)
        except DataError as error:
            unscored[step] = str(error)
            return None
        proprio = episode.states[step].astype(np.float64)
        start = perf_counter()
        try:
            decision = self._policy.act(Observation(image, instruction, proprio, step))
        except (EngineError, RequestError) as error:
            decision = Decision(np.full(7, np.nan), fault=str(error))
        self.durations_ms.append(1e3 * (perf_counter() - start))
        self._faults = self._faults + 1 if decision.fault else 0
        if self._faults >= _MAX_FAULTS_IN_A_ROW:
            raise EngineError(
                f"the policy failed {self._faults} times in a row, last at {episode.source}, step {step}: "
                f"{decision.fault}; mend it; the same command goes on"
            )
        return decision

    def _answer_by_actions(self, episode, steps, unscored, decisions):
        """Ask every step whose action a label of `steps` is made of, then label the actions."""
        last = max(len(episode) - 2, 0)  # the last step repeats the label before it
        starts = {step: min(step, last) for step in steps if step not in unscored}
        needed = {start + k for start in starts.values() for k in range(-1, TRANSITIONS)}
        for step in sorted(needed & set(range(last + 1))):
            if step not in decisions and step not in unscored:
                decisions[step] = self._ask(episode, step, unscored)
        for step, start in starts.items():
            window = range(start, min(start + TRANSITIONS, last + 1))
            missing = [at for at in window if decisions.get(at) is None]
            if missing:
                unscored[step] = unscored[missing[0]]
                continue
            faults = [decisions[at].fault for at in window if decisions[at].fault]
            around = [decisions.get(at) for at in (start - 1, *window)]
            phrase = None if faults else _label_actions(episode, start, around)
            decision = decisions.get(step) or decisions[start]
            yield step, _describe(decision, phrase, "actions") | {"fault": faults[0] if faults else None}


def _label_actions(episode: Episode, start: int, decisions: Sequence[Decision | None]) -> str:
    """The phrase of consecutive actions by the labeller's thresholds, as if a robot had carried them out.

    decisions: the one before the window (None where it was not asked), then those of the window. The
    gripper is compared as commanded, for a held object measures as half open; before the first
    command it counts as open from OPEN_THRESHOLD of its measured range on.
    """
    before, *window = decisions
    actions = np.array([decision.action for decision in window if decision is not None])
    opened = episode.states[start, 6] >= OPEN_THRESHOLD if before is None or before.fault else before.action[6] > 0.5
    motion = np.append(actions[:, :6].sum(axis=0), float(actions[-1, 6] > 0.5) - float(opened))
    return format_phrase(label_window(np.stack([np.zeros(7), motion])))


def _describe(decision: Decision, phrase: str | None, source: str) -> Fields:
    """A row's fields; numbers are rounded so that rows stay short."""
    fields = {"phrase": phrase, "phrase_source": source, "fault": decision.fault}
    if np.isfinite(decision.action).all():
        fields["action"] = np.round(decision.action, _DECIMALS)
    for name in ("probability", "margin", "missing_mass"):
        value = getattr(decision, name)
        if value is not None:
            fields[name] = round(value, _DECIMALS)
    if decision.marginals is not None:
        fields["marginals"] = {axis: np.round(values, _DECIMALS) for axis, values in decision.marginals.items()}
    return fields
