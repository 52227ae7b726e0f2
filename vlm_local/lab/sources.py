"""Who answers in a rollout: the oracle, or any policy."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from vlm_local.actions import GripperLatch, StepTable, build_action, build_step_table, load_step_table
from vlm_local.assembly import PolicyOptions, is_url, open_policies, refuse_all_but
from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy import Policy
from vlm_local.primitives import parse_phrase
from vlm_local.remote_policy import RemotePolicy
from vlm_local.types import Decision, Observation
from vlm_local.wrappers import HoldPhrase

ORACLE = "oracle"
_MOST_ROBOTS = 16  # of one server


class Scene(Protocol):
    """What the simulator shows after a step."""

    @property
    def oracle(self) -> str:
        """The oracle's phrase for it."""


class OraclePolicy:
    """Answers with the oracle's phrase for `scene`, which the rollout sets before each `act`."""

    scene: Scene

    def __init__(self, table: StepTable = StepTable()):
        self._table = table
        self._latch = GripperLatch()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {"model": ORACLE, "steps": asdict(self._table), "trained": None}

    def reset(self, seed: int) -> None:
        self._latch.reset()

    def act(self, observation: Observation) -> Decision:
        primitive = parse_phrase(self.scene.oracle)
        command = self._latch.update(primitive.gripper, float(observation.proprio[6]))
        return Decision(build_action(primitive, command, self._table), self.scene.oracle)


class RandomPhrases:
    """Replaces a share of the inner policy's phrases by random ones, carried out with the same step table.

    The gripper command follows what was done, also where the phrase is the policy's own.
    """

    def __init__(self, policy: Policy, share: float):
        """Raises ConfigError where the policy's metadata tell of a step table that is none."""
        self._policy, self._share = policy, share
        self._table = build_step_table(policy.metadata.get("steps") or {})
        self._phrases = load_phrase_grammar().sentences
        self._latch = GripperLatch()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {**self._policy.metadata, "noise": self._share}

    def reset(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 1])
        self._latch.reset()
        self._policy.reset(seed)

    def act(self, observation: Observation) -> Decision:
        decision = self._policy.act(observation)
        phrase, action = decision.phrase, np.array(decision.action, np.float64)
        if self._rng.random() < self._share:
            phrase = self._phrases[self._rng.integers(len(self._phrases))]
            action = build_action(parse_phrase(phrase), 0.0, self._table)
        elif phrase is None:  # a foreign policy's own numbers
            return decision
        action[6] = self._latch.update(parse_phrase(phrase).gripper, float(observation.proprio[6]))
        return replace(decision, phrase=phrase, action=action)


@dataclass(frozen=True)
class Cast:
    """build: worker number -> (policy, whisper); `whisper` is told the scene before each act.

    most_workers: environments that may ask at once. close: lets go of model and threads.
    sees: it looks at the pictures.
    """

    build: Callable[[int], tuple[Policy, Callable[[Scene], None]]]
    metadata: Mapping[str, Any]
    most_workers: int
    close: Callable[[], None]
    sees: bool = True


def open_cast(options: PolicyOptions, noise: float) -> Cast:
    """options.model may also be "oracle". noise: share of phrases that are replaced by random ones.

    Raises ConfigError as open_policies does, and EngineError where a server does not answer.
    """
    if options.model == ORACLE:
        refuse_all_but(options, "steps", "steps_per_phrase")
        table = load_step_table(options.steps) if options.steps else StepTable()
        build = partial(_build_oracle, table, options.steps_per_phrase, noise)
        metadata = _hold(OraclePolicy(table), options.steps_per_phrase).metadata
        return Cast(build, metadata, _MOST_ROBOTS, close=lambda: None, sees=False)
    if is_url(options.model):  # a phrase can be held here, too
        metadata = open_policies(replace(options, steps_per_phrase=None)).metadata
        return _open_server(options, metadata, noise)
    policies = open_policies(options)
    try:
        policies.build("sim0")  # waits until the model is loaded, and raises what that raised
    except BaseException:
        policies.close()
        raise

    def build(worker: int):
        return _disturb(policies.build(f"sim{worker}"), noise), _whisper_nothing

    sees = policies.metadata.get("engine") != "scripted"
    return Cast(build, policies.metadata, _MOST_ROBOTS, policies.close, sees)


def _open_server(options: PolicyOptions, metadata: Mapping[str, Any], noise: float) -> Cast:
    """Our own server gives every named robot its own episode; another knows one robot only."""
    url = options.model
    is_ours = metadata.get("server") == "vlm-local"
    opened: list[RemotePolicy] = []

    def build(worker: int):
        opened.append(RemotePolicy(f"{url.rstrip('/')}/s/sim{worker}" if is_ours else url))
        return _disturb(_hold(opened[-1], options.steps_per_phrase), noise), _whisper_nothing

    def close() -> None:
        for policy in opened:
            policy.close()

    if (options.steps_per_phrase or 1) > 1:
        metadata = {**metadata, "steps_per_phrase": options.steps_per_phrase}
    return Cast(build, metadata, _MOST_ROBOTS if is_ours else 1, close)


def _hold(policy: Policy, steps: int | None) -> Policy:
    return HoldPhrase(policy, steps) if (steps or 1) > 1 else policy


def _disturb(policy: Policy, noise: float) -> Policy:
    return RandomPhrases(policy, noise) if noise else policy


def _whisper_nothing(scene: Scene) -> None:
    """Only the oracle is told."""


def _build_oracle(table: StepTable, steps_per_phrase: int | None, noise: float, worker: int):
    oracle = OraclePolicy(table)
    return _disturb(_hold(oracle, steps_per_phrase), noise), lambda scene: setattr(oracle, "scene", scene)
