"""What all routes share: robots, the engine's health, requests in flight, subscribers; reading a body, answering."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from flask import Response, g, request

from vlm_local import __version__
from vlm_local.assembly import Policies
from vlm_local.bounds import MAX_LISTED, check_one_text
from vlm_local.embodiments import AUTO, BRIDGE, load_embodiment
from vlm_local.embodiments.frame import Frame
from vlm_local.errors import RequestError
from vlm_local.fields import Reserve
from vlm_local.files import encode_json
from vlm_local.safety import MAX_STEP, Guard, HoldOnFault, Workspace
from vlm_local.server.access import Gate, take_place
from vlm_local.server.budget import Budget
from vlm_local.server.callers import Callers, is_given
from vlm_local.server.episodes import EpisodeSettings, Robot, Robots, Step
from vlm_local.server.records import Record, Subscriber, Subscription
from vlm_local.server.repeats import Repeats
from vlm_local.server.state import RobotStates
from vlm_local.wire import Message

logger = logging.getLogger(__name__)

LARGE_BODY = 2**20  # bytes; a 256x256 picture takes a quarter of it
MAX_LARGE_BODIES = 2  # read at a time; the largest takes some 300 MB on its way from text to picture
_LARGE_BODY_WAIT_S = 5.0
LARGE_PICTURE = 2**22  # bytes, unpacked
MAX_UNPACKED = 2**28  # bytes that large pictures out of files take together: 40 of 1920x1080, 5 of 4096x4096
_HEAD = 2**16  # bytes of a large body that show what it is
_LOOK_EVERY_S = 0.05  # while a request is held open

_WHY_NOT = {
    "loading": "the model is still loading; /health turns 200 when it can answer",
    "failed": "the model could not be loaded; the server's log says why",
    "stopping": "the server is stopping",
    "closed": "the server is stopping",
}


def describe_action(embodiment: str) -> dict[str, Any]:
    """The 7 numbers of an action as this embodiment is sent them, for /metadata."""
    robot = load_embodiment(BRIDGE if embodiment == AUTO else embodiment)
    units = {"m": 1.0, "rad": 1.0} if robot.action_units is None else robot.action_units
    metre, radian = (name if units[name] == 1 else f"{units[name]:g} {name}" for name in ("m", "rad"))
    closed, opened = (robot.gripper_command[state] for state in ("closed", "open"))
    return {
        "names": ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"],
        "units": [*[metre] * 3, *[radian] * 3, f"{opened:g} open, {closed:g} closed"],
        "frame": "robot base: +x forward, +y left, +z up; deltas per control step, gripper absolute",
        "control_hz": robot.control_hz,
    }


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server, apart from the model's.

    prefix: path below which the routes also answer, such as "/robots"; "" for none.
    names: lower-case host names of this machine, by which it may be asked without a token (see access.check_origin).
    on_fault: "hold" answers a failure of the model with a stand-still, "error" with 503.
    max_held: failures in a row that are answered with a stand-still; the next one is a 503.
    max_robots: named robots at the same time, beside the unnamed one.
    rate_limit: requests to /act a second from one address, None for any number.
    workspace, max_step: bounds that every action is cut to (see safety.Guard).
    embodiment: a name, a file or AUTO: what the numbers of states and actions mean (see embodiments/frame.py).
    loading_s: how long a robot's request is held open while the model loads; AutoEval would end its job on a 503.
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
    embodiment: str = AUTO
    loading_s: float = 60.0

    def build_frame(self) -> Frame:
        """For one robot. Its turns are as small as the largest of the three angles of `max_step`."""
        return Frame(self.embodiment, max(self.max_step[3:]))


class Service:
    """State shared by all routes: robots, the engine's health, requests in flight, subscribers. Any thread may use it.

    report: lines of /health, name -> function that gives the value.
    """

    def __init__(self, policies: Policies, settings: ServerSettings, states: RobotStates | None):
        self.settings = settings
        self.states = RobotStates() if states is None else states
        idle_s = settings.episodes.idle_s
        self.callers = Callers(settings.max_robots, idle_s, on_split=self._share_state, on_mixed=self._begin_anew)
        unnamed = [name for name in self.states.names if is_given(name)]
        self.states.mix(unnamed, unnamed)  # they are of another run, and who comes first now gets the first name
        self.robots = Robots(self._build_robot, settings.max_robots, is_free=self.callers.is_free)
        self.repeats = Repeats(4 * settings.max_robots, settings.max_robots)
        self.budget = Budget()
        self.subscriptions: list[Subscription] = []
        self.stopping = threading.Event()
        self.report: dict[str, Callable[[], Any]] = {"held": self.states.describe}
        self.policies = policies
        self._action = describe_action(settings.embodiment)
        self._large_bodies = threading.BoundedSemaphore(MAX_LARGE_BODIES)
        self._held_open = threading.BoundedSemaphore(settings.max_robots)
        self._num_inside = 0
        self._num_unpacked = 0  # bytes
        self._changed = threading.Condition()

    @property
    def state(self) -> str:
        """ "stopping", or the engine's: see EngineWorker.state. A policy without an engine is "healthy"."""
        if self.stopping.is_set():
            return "stopping"
        worker = self.policies.worker
        return "healthy" if worker is None else worker.state

    @property
    def metadata(self) -> dict[str, Any]:
        """The answer of /metadata: JSON values."""
        return {
            **self.policies.metadata,  # first: behind a remote policy stands a server with a state of its own
            "server": "vlm-local",
            "version": __version__,
            "state": self.state,
            "action": self._action,
            "on_fault": self.settings.on_fault,
            "embodiment": self.settings.embodiment,
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

    def wait_loaded(self, timeout_s: float) -> None:
        """Hold a request open while the model loads, at most as many as there are robots.

        Raises RequestError (503) for one more. What has become of the model then is for `enter` to say.
        """
        if self.state != "loading" or not timeout_s:
            return
        end = time.monotonic() + timeout_s
        with take_place(self._held_open, _WHY_NOT["loading"]):
            while self.state == "loading" and time.monotonic() < end:
                self.stopping.wait(_LOOK_EVERY_S)

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a request as in flight during the block.

        Raises RequestError (503) while the model is loading, and after it has failed or the server is stopping.
        """
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

    def reading(self, num_bytes: int | None) -> AbstractContextManager[None]:
        """Wrap the reading and parsing of a body of `num_bytes`; at most MAX_LARGE_BODIES large ones at a time.

        Raises RequestError (503) for a large one that has waited for _LARGE_BODY_WAIT_S.
        """
        if (num_bytes or 0) <= LARGE_BODY:
            return nullcontext()
        refusal = f"{MAX_LARGE_BODIES} large bodies are being read already; send a smaller picture"
        return take_place(self._large_bodies, refusal, _LARGE_BODY_WAIT_S)

    @contextmanager
    def unpacking(self) -> Iterator[Reserve]:
        """Wrap a request whose picture may be a file: 65 kB of text can be 50 MB of pixels.

        What it gives takes room for them until the request ends. It raises RequestError (503) where there is none.
        """
        taken = 0

        def reserve(num_bytes: int) -> None:
            nonlocal taken
            if num_bytes <= LARGE_PICTURE:
                return
            with self._changed:
                if self._num_unpacked + num_bytes > MAX_UNPACKED:
                    raise RequestError("too many large pictures are being answered; send smaller ones", 503)
                self._num_unpacked += num_bytes
            taken += num_bytes

        try:
            yield reserve
        finally:
            with self._changed:
                self._num_unpacked -= taken

    def drain(self, grace_s: float) -> bool:
        """Refuse new requests and wait for those in flight, `grace_s` at most. True when all of them have ended."""
        self.stopping.set()
        with self._changed:
            return self._changed.wait_for(lambda: self._num_inside == 0, grace_s)

    def test(self, message: Message) -> Step:
        """Answer AutoEval's submission test as a robot that nobody else is: no place is taken, nothing is kept."""
        return self._build_robot("test", RobotStates()).act(message)

    def _share_state(self, old: Sequence[str], new: str) -> None:
        """One of them may be held or hold something, and nobody knows which: none moves or lets go for that."""
        self.states.mix(old, [new])

    def _begin_anew(self, names: Sequence[str]) -> None:
        if len(names) > 1:
            logger.warning(
                "%s lost their connections, and gave no names: who is who is not known, and each begins a new episode; "
                "give each station a name of its own, http://HOST:PORT/s/NAME",
                " and ".join(names),
            )
        self.states.mix(names, names)
        self.robots.begin_anew(names)

    def _build_robot(self, name: str, states: RobotStates | None = None) -> Robot:
        """states: None for those that all robots share."""
        settings = self.settings
        policy = Guard(self.policies.build(name), settings.workspace, settings.max_step)  # waits for the model
        if settings.on_fault == "hold":
            policy = HoldOnFault(policy, settings.max_held)
        model = self.policies.metadata.get("model")
        states = self.states if states is None else states
        return Robot(name, policy, settings.episodes, states=states, build_frame=settings.build_frame, model=model)


def read_body() -> bytes:
    """The whole body of the present request, whose length has been checked.

    Flask's get_data reads 64 kB at a time and joins the parts: 141 ms of processor time for 60 MB instead of 44.
    Raises RequestError for a long list, before all of it is read, and for a compressed body.
    """
    if "body" in g:
        return g.body
    if (coding := request.headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise RequestError(f"the body came with Content-Encoding {coding[:40]!r}; send it as it is", 415)
    stream, length = request.environ["wsgi.input"], request.content_length or 0
    if length > MAX_LISTED:
        check_one_text(stream.read(_HEAD), length)
        stream.seek(0)
    return stream.read(length)


def send_json(value: Any, status: int = 200) -> Response:
    """JSON and a newline, for people who ask with curl."""
    return Response(encode_json(value) + "\n", status, mimetype="application/json")
