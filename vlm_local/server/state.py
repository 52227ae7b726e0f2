"""State of robots that outlives an episode and a restart: who is held by a person, and each gripper's last command.

The server writes it to state.json in the run's folder, and the next server on this port goes on with it.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlm_local.actions import OPEN_THRESHOLD, find_first_command
from vlm_local.data.summary import list_runs
from vlm_local.errors import RequestError
from vlm_local.files import encode_json, is_locked
from vlm_local.server.state_file import StateFile

logger = logging.getLogger(__name__)

FILE = "state.json"  # in the run's folder
_WAIT_S = 0.2  # the longest that a robot waits for the disk, and only when a gripper's command turns
_LONG_WAIT_S = 2.0  # for the disk, where no robot waits
_MAX_NAMES = 1024  # robots that are remembered; those that changed last stay
_HELD_MOST = 0.85  # of the gripper's range: the widest that a held object is read as


@dataclass(frozen=True)
class Gripper:
    """The state of one robot's gripper between two of its steps.

    command: 0 closed..1 open, as last sent; None where nothing was. arrived: whether the measured
    opening has agreed with the command since it was given: a closing gripper still reads open for a
    step or two. is_reset: a client said that a new episode begins.
    """

    command: float | None = None
    arrived: bool = False
    is_reset: bool = False

    @property
    def is_open(self) -> bool:
        return self.command is not None and self.command > 0.5

    @property
    def kind(self) -> tuple[bool, ...]:
        """The part that is written to disk when it changes; the exact command of a foreign policy is not."""
        return self.command is None, self.is_open, self.arrived, self.is_reset

    def keep(self, opening: float | None) -> "Gripper":
        """The same command one measurement later. opening: 0..1 measured, None where it is not."""
        if self.command is None:
            return replace(self, command=find_first_command(opening), arrived=opening is not None)
        agrees = opening is not None and (opening >= OPEN_THRESHOLD) == self.is_open
        return replace(self, arrived=self.arrived or agrees)

    def follow(self, opening: float | None, starts: bool) -> tuple["Gripper", str | None]:
        """The command that a step begins with, and why where it is not the last one sent.

        starts: whether the step begins an episode. Only a reset asks the measurement first. Else the last
        command stays, unless the gripper was seen where the command put it and is elsewhere now: then a
        person or another program moved it.
        """
        if self.command is None or self.is_reset:
            unknown = self.command is None and not self.is_reset and opening is None
            why = "is neither recorded nor measured, so it is opened" if unknown else None
            return Gripper().keep(opening), why
        if self.arrived and opening is not None:
            if not self.is_open and opening >= OPEN_THRESHOLD:
                return Gripper(1.0, True), f"was opened by someone else: commanded closed, measured {opening:.2f}"
            if self.is_open and starts and opening <= _HELD_MOST:
                return Gripper(0.0, True), f"was closed by someone else: commanded open, measured {opening:.2f}"
        return self.keep(opening), None

    def tell(self, command: float) -> "Gripper":
        """The state after `command` (0 closed..1 open) was sent."""
        turns = (command > 0.5) != self.is_open
        return Gripper(command, self.arrived and not turns)


@dataclass(frozen=True)
class Hold:
    """A person has stopped an arm. reason: in the person's words. since: Unix seconds."""

    reason: str
    since: float


class RobotStates:
    """Holds and grippers of all robots, written to `folder` whenever they change. Any thread may call it.

    A hold counts from the moment `hold` is called, whether or not it can be written.
    """

    def __init__(self, folder: Path | None = None, previous: Path | None = None, port: int | None = None):
        """folder: of the run, None to write nothing. previous: folder of the run that this one continues.

        port: the server's, by which `find_previous` tells the runs of several servers apart.
        """
        self._lock = threading.Lock()
        self._all: Hold | None = None
        self._robots: dict[str, Hold | None] = {}  # where they differ from `_all`
        self._grippers: dict[str, Gripper] = {}
        self._port = port
        self._listeners: list[Callable[[], None]] = []
        self._file = None if folder is None else StateFile(folder / FILE, self._encode)
        sources = [source / FILE for source in (folder, previous) if source is not None]
        source = next((source for source in sources if source.is_file()), None)
        if source is not None:
            self._load(source)
        is_written = self._file is not None and self._file.write(_LONG_WAIT_S)
        if is_written and source is not None and source.parent == previous:
            with suppress(OSError):  # put aside, so that no second server takes it over as well
                source.rename(source.with_name("state.continued.json"))

    def on_hold(self, listener: Callable[[], None]) -> None:
        """listener: called after each hold and release."""
        self._listeners.append(listener)

    def hold(self, robot: str | None, reason: str) -> bool:
        """Hold one robot, or all for None. True where it was written down, so that a restart keeps it."""
        return self._change(robot, Hold(reason, time.time()))

    def release(self, robot: str | None) -> bool:
        """Release one robot, or all for None, also those held one by one. Returns as `hold`."""
        return self._change(robot, None)

    def _change(self, robot: str | None, hold: Hold | None) -> bool:
        with self._lock:
            if robot is None:
                self._all = hold
                self._robots.clear()
            elif robot not in self._robots and len(self._robots) >= _MAX_NAMES:
                raise RequestError(f"{_MAX_NAMES} robots are held or released one by one; use /hold for all", 403)
            elif hold is None and self._all is None:
                self._robots.pop(robot, None)
            else:
                self._robots[robot] = hold
        for listener in self._listeners:
            listener()
        return self._file is not None and self._file.write(_LONG_WAIT_S)

    def find_hold(self, robot: str) -> Hold | None:
        """The hold that counts for this robot, its own or that of all; None where it may move."""
        with self._lock:
            return self._robots.get(robot, self._all)

    def find_gripper(self, robot: str) -> Gripper:
        """The gripper's last known state; that of an unknown gripper for a robot that never acted."""
        with self._lock:
            return self._grippers.get(robot, Gripper())

    def set_gripper(self, robot: str, gripper: Gripper) -> None:
        """Remember a gripper's state. Waits for the disk, _WAIT_S at most, only when its command turns."""
        with self._lock:
            before = self._grippers.pop(robot, Gripper())
            self._grippers[robot] = gripper
            if len(self._grippers) > _MAX_NAMES:  # names that were only reset go first: they may be made up
                unused = (name for name, known in self._grippers.items() if known.command is None)
                del self._grippers[next(unused, next(iter(self._grippers)))]
        if before.kind != gripper.kind and self._file is not None:
            turns = (before.is_open, before.is_reset) != (gripper.is_open, gripper.is_reset)
            self._file.write(_WAIT_S if turns else 0.0)

    @property
    def is_known(self) -> bool:
        """Whether there is anything that a restart must know."""
        with self._lock:
            return self._all is not None or bool(self._robots or self._grippers)

    @property
    def names(self) -> list[str]:
        """Robots of which a hold or a gripper is known."""
        with self._lock:
            return list(self._robots.keys() | self._grippers.keys())

    def mix(self, before: Iterable[str], now: Iterable[str]) -> None:
        """Any robot of `now` may be any of `before`. One of these that is held holds all. A gripper that is closed
        closes all that are not measured: one of them may hold something.
        """
        before, now = list(before), list(now)
        if (hold := next(filter(None, map(self.find_hold, before)), None)) is not None:
            for name in now:
                if self.find_hold(name) is None:
                    self.hold(name, hold.reason)
        known = [gripper for gripper in map(self.find_gripper, before) if gripper != Gripper()]
        opens = {gripper.is_open for gripper in known if gripper.command is not None}
        if opens:
            arrived = len(opens) > 1 or all(gripper.arrived for gripper in known)  # then a measurement overrules it
            gripper = Gripper(float(opens == {True}), arrived, all(gripper.is_reset for gripper in known))
            for name in now:
                self.set_gripper(name, gripper)

    def describe(self) -> dict[str, Any]:
        """all: the hold of every robot or None; robots: name -> hold, or None for one that is released alone."""
        with self._lock:
            robots = {name: hold and asdict(hold) for name, hold in self._robots.items()}
            return {"all": self._all and asdict(self._all), "robots": robots}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _encode(self) -> str:
        held = self.describe()
        with self._lock:
            grippers = {name: asdict(gripper) for name, gripper in self._grippers.items()}
        return encode_json({"port": self._port, "held": held, "grippers": grippers}, indent=1) + "\n"

    def _load(self, path: Path) -> None:
        try:
            told = json.loads(path.read_bytes())
            everyone = _read_hold(told["held"]["all"])
            robots = {name: _read_hold(hold) for name, hold in told["held"]["robots"].items()}
            grippers = {name: _read_gripper(**gripper) for name, gripper in told["grippers"].items()}
            self._all, self._robots, self._grippers = everyone, robots, grippers
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{path} cannot be read ({error!r}), and it says which robots were held"
            logger.error("%s; all are held until POST /release", reason)
            self._all = Hold(reason, time.time())


def _read_hold(hold: Mapping[str, Any] | None) -> Hold | None:
    return None if hold is None else Hold(str(hold["reason"]), float(hold["since"]))


def _read_gripper(command: float | None = None, arrived: bool = False, is_reset: bool = False) -> Gripper:
    if command is not None and not 0 <= command <= 1:
        raise ValueError(f"{command} commands no gripper")
    return Gripper(command, bool(arrived), bool(is_reset))


def find_previous(parent: Path, port: int) -> Path | None:
    """The run in `parent` that a server on this port continues: the newest that has ended, its own first."""
    runs = [run for run in list_runs(parent) if (run / FILE).is_file() and not is_locked(run)]
    own = [run for run in runs if _read_port(run / FILE) == port]
    return max(own or runs, key=lambda run: (run / FILE).stat().st_mtime, default=None)


def _read_port(path: Path) -> int | None:
    try:
        return json.loads(path.read_bytes()).get("port")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
