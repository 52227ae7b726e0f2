"""Policies for the workers of a study, from one name: a model, a folder, a phrase, a server's URL, or the oracle."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from vlm_local.actions import GripperLatch, StepTable, build_action, load_step_table
from vlm_local.assembly import Policies, describe_options, is_url, open_policies, refuse_all_but
from vlm_local.environments import Suite
from vlm_local.errors import ConfigError
from vlm_local.plain import hide_secrets
from vlm_local.policy import HoldPhrase, Policy
from vlm_local.policy_options import PolicyOptions
from vlm_local.primitives import parse_phrase
from vlm_local.registry import DEFAULT
from vlm_local.types import Decision, Observation

ORACLE = "oracle"
_MAX_ROBOTS = 16  # of a server of ours, as ServerSettings has it


class PolicySource:
    """A policy for each worker, all of one model or server.

    metadata: what the policy says of itself, once it is loaded. max_workers: policies that may be asked at once.
    sees: whether it looks at the pictures.
    """

    metadata: Mapping[str, Any] = {}
    max_workers: float = math.inf
    sees: bool = True

    def build(self, worker: str, tell_all: bool = False, read_oracle: Callable[[], str] | None = None) -> Policy:
        """worker: its name, which a server of ours keeps apart from others'. tell_all: with all probabilities.

        read_oracle: gives the oracle's phrase for the present state, where there is a simulator.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the model and of connections."""


def open_source(options: PolicyOptions, suite: Suite | None = None) -> PolicySource:
    """options.model may also be "oracle". The model is loaded then.

    suite: in which it plays. The oracle takes its table unless options.steps names one; others its embodiment unless
    they have one.

    Raises ConfigError as open_policies does, EngineError where a server does not answer.
    """
    if options.model == ORACLE:
        return _Oracle(options, suite.table if suite else StepTable())
    if suite and options.embodiment is None:
        options = replace(options, embodiment=suite.embodiment)
    return _Server(options) if is_url(options.model) else _Model(options)


def name_policy(options: PolicyOptions) -> str:
    """As results name it: what the user said, without secrets."""
    return hide_secrets(options.model or DEFAULT)


def describe_unloaded(options: PolicyOptions) -> Mapping[str, Any]:
    """What the policy will say of itself, as far as its files tell; nothing of a server, or where a file is missing."""
    if options.model == ORACLE or is_url(options.model):
        return {}
    try:
        return describe_options(options)
    except ConfigError:  # raised again where somebody is to be asked
        return {}


class _Model(PolicySource):
    """A model in this process, or a phrase that is always said."""

    def __init__(self, options: PolicyOptions):
        self._policies = open_policies(options)
        try:
            self._policies.build("first")  # waits until the model is loaded, and raises what that raised
        except BaseException:
            self._policies.close()
            raise
        self.metadata = self._policies.metadata
        self.sees = self.metadata.get("engine") != "scripted"

    def build(self, worker, tell_all=False, read_oracle=None):
        return self._policies.build(worker, tell_all)

    def close(self):
        self._policies.close()


class _Server(PolicySource):
    """A running server. Ours keeps an episode for every named robot; another knows one robot only."""

    def __init__(self, options: PolicyOptions):
        self._steps = options.steps_per_phrase  # a phrase can be held on this side, too
        self._options = replace(options, steps_per_phrase=None)
        self._policies: list[Policies] = []
        self.metadata = self._open(self._options).metadata
        self._has_robots = self.metadata.get("server") == "vlm-local" and "/s/" not in (options.model or "")
        self.max_workers = _MAX_ROBOTS if self._has_robots else 1
        if (self._steps or 1) > 1:
            self.metadata = {**self.metadata, "steps_per_phrase": self._steps}

    def build(self, worker, tell_all=False, read_oracle=None):
        url = (self._options.model or "").rstrip("/")
        named = replace(self._options, model=f"{url}/s/{worker}") if self._has_robots else self._options
        return _hold(self._open(named).build(worker), self._steps)

    def close(self):
        for policies in self._policies:
            policies.close()

    def _open(self, options: PolicyOptions) -> Policies:
        self._policies.append(open_policies(options))
        return self._policies[-1]


class _Oracle(PolicySource):
    """The simulator's own answers, which no policy can know."""

    sees = False

    def __init__(self, options: PolicyOptions, table: StepTable):
        refuse_all_but(options, "steps", "steps_per_phrase")
        self._table = load_step_table(options.steps) if options.steps else table
        self._steps = options.steps_per_phrase
        self.metadata = _hold(OraclePolicy(lambda: "", self._table), self._steps).metadata

    def build(self, worker, tell_all=False, read_oracle=None):
        if read_oracle is None:
            raise ConfigError("the oracle knows the simulator's state and nothing else, so only `sim` can ask it")
        return _hold(OraclePolicy(read_oracle, self._table), self._steps)


class OraclePolicy:
    """Carries out the phrase that `read_oracle` gives for the present state."""

    def __init__(self, read_oracle: Callable[[], str], table: StepTable):
        self._read_oracle = read_oracle
        self._table = table
        self._latch = GripperLatch()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {"model": ORACLE, "steps": asdict(self._table), "trained": None}

    def reset(self, seed: int) -> None:
        self._latch.reset()

    def act(self, observation: Observation) -> Decision:
        phrase = self._read_oracle()
        primitive = parse_phrase(phrase)
        command = self._latch.update(primitive.gripper, observation.opening)
        return Decision(build_action(primitive, command, self._table), phrase)


def _hold(policy: Policy, steps: int | None) -> Policy:
    return policy if steps is None or steps == 1 else HoldPhrase(policy, steps)
