"""Builds policies from options, for the server, the evaluation, the simulator, the benchmarks and the training."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from vlm_local import __version__
from vlm_local.answers import Answerer
from vlm_local.embodiments import AUTO
from vlm_local.engines import Engine
from vlm_local.engines.worker import EngineWorker
from vlm_local.plain import hide_secrets
from vlm_local.policy import Policy
from vlm_local.policy_options import PolicyOptions, refuse
from vlm_local.registry import DEFAULT
from vlm_local.remote_policy import RemotePolicy
from vlm_local.resolved_options import ResolvedOptions

_REMOTE_S = 30.0  # for a policy server's answer where no deadline is shorter


class Policies:
    """Builds a policy for each robot, all on one engine. Any thread may use it.

    worker: the thread that owns the engine, None for a remote policy. answerer: puts typed questions to the same
    engine; None where there is no model to ask. embodiment: of the robots, a name, a file or "auto".
    """

    def __init__(
        self,
        build: Callable[[str | None, bool], Policy],
        worker: EngineWorker | None,
        metadata: Mapping[str, Any],
        answerer: Answerer | None = None,
        embodiment: str = AUTO,
    ):
        self.embodiment = embodiment
        self.worker = worker
        self.answerer = answerer
        self._build = build
        self._metadata = metadata

    def build(self, robot: str | None, tell_all: bool = False) -> Policy:
        """A policy for this robot. Waits until the engine is loaded and raises what its load raised.

        robot: None for a policy that no robot waits for.
        tell_all: with the probabilities of all phrases, as far as the engine can give them.
        """
        if self.worker is not None:
            self.worker.wait_loaded()
        return self._build(robot, tell_all)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of policy and engine, JSON values. What only the loaded engine knows is missing before it is loaded."""
        engine = {} if self.worker is None else self.worker.metadata
        versions = {"vlm_local": __version__, **engine.get("versions", {})}
        return {**self._metadata, **engine, "versions": versions}

    def close(self) -> None:
        """Stop the engine; whatever waits for it fails."""
        if self.worker is not None:
            self.worker.close()


def open_policies(
    options: PolicyOptions, wrap: Callable[[Engine], Engine] = lambda engine: engine, apart: bool = False
) -> Policies:
    """Read the files that the options name and start to load the model.

    wrap: applied to the loaded engine, for benchmarks. apart: a model that runs on this machine gets a process of its
    own, so that the caller's other threads do not slow it down, and thoughts are written between the robots' steps;
    else a step waits for them.

    Raises ConfigError at once for what is missing or contradicts itself; what only the load finds
    out (memory, damaged weights) is raised by `Policies.build` and by the worker.
    """
    model = options.model or DEFAULT
    if is_url(model):
        refuse_all_but(options, "offline", "deadline_ms", "embodiment")
        timeout_s = _REMOTE_S if options.deadline_ms is None else min(_REMOTE_S, options.deadline_ms / 1e3)
        policy = RemotePolicy(model, timeout_s)
        embodiment = options.embodiment or AUTO
        return Policies(lambda robot, tell_all: RemotePolicy(model, timeout_s), None, policy.metadata, None, embodiment)
    resolved = _resolve(options, between_steps=apart)
    load = resolved.load_apart if apart else resolved.load
    warm_up = resolved.build_warm_up(), resolved.build_warm_thought()
    worker = EngineWorker(lambda: wrap(load()), options.deadline_ms, *warm_up)
    return _build_policies(resolved, worker)


def describe_options(options: PolicyOptions) -> dict[str, Any]:
    """What a policy of these options, other than a server, says of itself but for its engine; loads nothing.

    Raises ConfigError as open_policies.
    """
    return _resolve(options, between_steps=False).metadata


def share_engine(worker: EngineWorker, options: PolicyOptions) -> Policies:
    """Policies of other options, such as another prompt, on an engine that is loaded. What the options say of the
    loading is not looked at. `close` ends the engine for all who share it.

    Raises ConfigError for what is missing or contradicts itself.
    """
    return _build_policies(_resolve(options, between_steps=False), worker)


def _resolve(options: PolicyOptions, between_steps: bool) -> ResolvedOptions:
    resolved = ResolvedOptions(options, between_steps)
    resolved.refuse_unused()
    resolved.load_examples()
    return resolved


def _build_policies(resolved: ResolvedOptions, worker: EngineWorker) -> Policies:
    answerer = resolved.build_answerer(worker)
    policies = Policies(
        lambda robot, tell_all: resolved.build_policy(robot, worker, policies.metadata, tell_all),
        worker,
        resolved.metadata,
        answerer,
        resolved.metadata["embodiment"],
    )
    return policies


def is_url(model: str | None) -> bool:
    """Whether this names a policy server."""
    return model is not None and model.startswith(("http://", "https://"))


def refuse_all_but(options: PolicyOptions, *used: str) -> None:
    """For a policy that decides for itself: raises ConfigError for flags that it would ignore."""
    names = [field.name for field in fields(options) if field.name not in ("model", *used)]
    refuse(options, names, f"{hide_secrets(options.model or '')} takes no", ": it decides for itself")
