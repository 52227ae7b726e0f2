"""What the routes share: the robots, the model's health, who is inside, who listens."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from vlm_local import __version__
from vlm_local.answers import Answerer
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import RequestError
from vlm_local.policy import Policy
from vlm_local.safety import MAX_STEP, Guard, HoldOnFault, Workspace
from vlm_local.server.access import Gate
from vlm_local.server.episodes import EpisodeSettings, Robot, Robots
from vlm_local.server.records import Record, Subscriber, Subscription
from vlm_local.server.state import RobotStates

ACTION_CONVENTION = {
    "names": ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"],
    "units": ["m", "m", "m", "rad", "rad", "rad", "1 open, 0 closed"],
    "frame": "robot base: +x forward, +y left, +z up; deltas per control step, gripper absolute",
    "control_hz": 5,
}

LARGE_BODY = 2**20  # bytes; a 256x256 picture takes a quarter of it
MAX_LARGE_BODIES = 2  # read at a time; the largest takes some 300 MB on its way from text to picture
_LARGE_BODY_WAIT_S = 5.0

_WHY_NOT = {
    "loading": "the model is still loading; /health turns 200 when it can answer",
    "failed": "the model could not be loaded; the server's log says why",
    "stopping": "the server is stopping",
    "closed": "the server is stopping",
}


@contextmanager
def take_place(places: threading.Semaphore, refusal: str) -> Iterator[None]:
    """One of `places`, or RequestError (503) at once: who waits for one would hold a thread that a robot may need."""
    if not places.acquire(blocking=False):
        raise RequestError(refusal, 503)
    try:
        yield
    finally:
        places.release()


class Policies(Protocol):
    """What the server needs of a model: a policy for each robot, answers to questions, word of its health."""

    worker: EngineWorker | None
    answerer: Answerer | None

    def build(self, robot: str | None, tell_all: bool = False) -> Policy: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class ServerSettings:
    """on_fault: "hold" or "error". rate_limit: requests to /act a second and address, None for any.

    names: of this machine, by which it may be asked without a token (see access.check_origin).
    workspace, max_step: what no robot is told to leave or exceed (see safety.Guard).
    """

    episodes: EpisodeSettings = field(default_factory=EpisodeSettings)
    gate: Gate = field(default_factory=Gate)
    prefix: str = ""
    names: frozenset[str] = frozenset()
    on_fault: str = "hold"
    max_held: int = 5
    max_robots: int = 16
    rate_limit: float | None = None
    workspace: Workspace | None = None
    max_step: tuple[float, ...] = MAX_STEP


class Service:
    """State shared by all routes: robots, the engine's health, requests in flight, subscribers. Any thread may use it.

    report: lines of /health, name -> function that gives the value.
    """

    def __init__(self, policies: Policies, settings: ServerSettings, states: RobotStates | None = None):
        self.settings = settings
        self.states = RobotStates() if states is None else states
        self.robots = Robots(self._build_robot, settings.max_robots)
        self.subscriptions: list[Subscription] = []
        self.stopping = threading.Event()
        self.report: dict[str, Callable[[], Any]] = {"held": self.states.describe}
        self.policies = policies
        self._large_bodies = threading.BoundedSemaphore(MAX_LARGE_BODIES)
        self._num_inside = 0
        self._changed = threading.Condition()

    @property
    def state(self) -> str:
        if self.stopping.is_set():
            return "stopping"
        worker = self.policies.worker
        return "healthy" if worker is None else worker.state

    @property
    def model(self) -> str | None:
        return self.policies.metadata.get("model")

    @property
    def metadata(self) -> dict[str, Any]:
        return {
            **self.policies.metadata,  # first: behind a remote policy stands a server with a state of its own
            "server": "vlm-local",
            "version": __version__,
            "state": self.state,
            "action": ACTION_CONVENTION,
            "on_fault": self.settings.on_fault,
        }

    def subscribe(self, subscriber: Subscriber) -> Subscription:
        """Have `subscriber` called with every record that is published from now on, in a thread of its own."""
        subscription = Subscription(subscriber)
        self.subscriptions.append(subscription)
        return subscription

    def publish(self, record: Record) -> None:
        """Tell all subscribers; never waits for one."""
        for subscription in self.subscriptions:
            subscription.put(record)

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a request for a robot as in flight, unless nothing can be answered now."""
        with self._changed:
            state = self.state
            if state in ("loading", "failed", "stopping", "closed"):
                raise RequestError(_WHY_NOT[state], 503)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    @contextmanager
    def reading(self, num_bytes: int | None) -> Iterator[None]:
        """While a body of this length is read and parsed: a small one at once, a large one when it is its turn.

        Raises RequestError (503) where that does not come soon.
        """
        if (num_bytes or 0) <= LARGE_BODY:
            yield
            return
        if not self._large_bodies.acquire(timeout=_LARGE_BODY_WAIT_S):
            raise RequestError(f"{MAX_LARGE_BODIES} large bodies are being read already; send a smaller picture", 503)
        try:
            yield
        finally:
            self._large_bodies.release()

    def drain(self, grace_s: float) -> bool:
        """Admit nobody any more and wait for those inside. True when they all left in time."""
        self.stopping.set()
        with self._changed:
            return self._changed.wait_for(lambda: self._num_inside == 0, grace_s)

    def _build_robot(self, name: str) -> Robot:
        policy = Guard(self.policies.build(name), self.settings.workspace, self.settings.max_step)
        if self.settings.on_fault == "hold":
            policy = HoldOnFault(policy, self.settings.max_held)
        return Robot(name, policy, self.settings.episodes, states=self.states)
