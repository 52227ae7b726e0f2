"""Which robot a request without a robot's name comes from: its connection and its instruction tell.

AutoEval keeps one connection for a whole job, and sends no name; its other clients open a connection for each request.
Two stations, or a station and its reset policy, are two connections, most often with two instructions. Where two that
say the same have lost their connections, nobody knows which of them comes back first: both begin anew.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_local.server.access import DEFAULT_ROBOT

# An instruction that comes back this soon after another one belongs to a second robot: a job's does not alternate.
ALTERNATES_S = 10.0
# A client that opens a connection for each request may be here again before a relay has closed the one before. So a new
# connection waits so long for one that has brought a single request, with the same instruction, so recently.
_CLOSES_S, _RECENT_S = 0.3, 1.0
_LOOKS = 30


@dataclass(eq=False)
class _Caller:
    """A robot as its requests come in. connection: the last one, None through a proxy; num_asked: requests on it.

    last: monotonic seconds. before: instruction of the episode before, and when it was said last.
    """

    name: str
    connection: Any = None
    num_asked: int = 0
    instruction: str | None = None
    last: float = 0.0
    is_reset: bool = False
    before: tuple[str | None, float] = (None, 0.0)

    @property
    def is_free(self) -> bool:
        """Whether its connection has closed, or it never had one of its own."""
        return self.connection is None or not self.connection.is_open

    def says(self, instruction: str | None) -> bool:
        """Whether a request with this instruction may be its own."""
        return instruction is None or self.instruction in (instruction, None)


def is_given(name: str) -> bool:
    """Whether `Callers` gives this name."""
    return name == DEFAULT_ROBOT or name.startswith(f"{DEFAULT_ROBOT}.")


class Callers:
    """Names for robots that give none: "robot", "robot.2" and so on. Any thread may call it."""

    def __init__(
        self,
        max_robots: int,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
        on_split: Callable[[Sequence[str], str], None] = lambda old, new: None,
        on_mixed: Callable[[Sequence[str]], None] = lambda names: None,
    ):
        """idle_s: after it a robot's place is given to a new connection with its instruction.

        on_split(old, new): the robot that is called `new` from now on may have been any of `old`. on_mixed(names): each
        of these names may be another robot's from its next request on.
        """
        self._on_split, self._on_mixed = on_split, on_mixed
        self._max_robots = max_robots
        self._idle_s = idle_s
        self._clock = clock
        self._callers: dict[str, _Caller] = {}
        self._lock = threading.Lock()

    def find(self, connection: Any, instruction: str | None) -> str:
        """The name of the robot that acts.

        connection: of the request; anything with `is_open`; None where a proxy shares its connections among robots,
        so that the instruction alone decides. instruction: None for that of the episode.
        """
        self._wait_for_closing(connection, instruction)
        with self._lock:
            caller = self._choose(connection, instruction)
            if instruction is not None and instruction != caller.instruction:
                caller.before = caller.instruction, caller.last
                caller.instruction = instruction
            return self._note(caller, connection, is_reset=False)

    def reset(self, connection: Any) -> str:
        """The name of the robot whose connection says that an episode begins."""
        self._wait_for_closing(connection, None)
        with self._lock:
            mine, free = self._list_of(connection), self._list(lambda caller: caller.is_free)
            if not mine and (mixed := self._find_mixed(connection, free)):
                caller = self._add(mixed)  # their instructions will tell who else is which
            else:
                caller = next(iter(mine or free), None) or self._add()
            return self._note(caller, connection, is_reset=True)

    def _note(self, caller: _Caller, connection: Any, is_reset: bool) -> str:
        caller.num_asked = caller.num_asked + 1 if caller.connection is connection else 1
        caller.connection, caller.last, caller.is_reset = connection, self._clock(), is_reset
        return caller.name

    def is_free(self, name: str) -> bool:
        """Whether a robot of this name was given it here, and its connection has closed."""
        with self._lock:
            caller = self._callers.get(name)
            return caller is not None and caller.is_free

    def _wait_for_closing(self, connection: Any, instruction: str | None) -> None:
        for _ in range(_LOOKS):
            if not self._is_closing(connection, instruction):
                return
            time.sleep(_CLOSES_S / _LOOKS)

    def _is_closing(self, connection: Any, instruction: str | None) -> bool:
        """Whether a new connection may be the next one of the robot that was here last, once that one's has closed."""
        with self._lock:
            said = self._list(lambda caller: caller.says(instruction))
            if connection is None or not said or any(caller.connection is connection for caller in said):
                return False
            last = said[0]
            return last.num_asked == 1 and not last.is_free and self._clock() - last.last < _RECENT_S

    def _choose(self, connection: Any, instruction: str | None) -> _Caller:
        mine, free = self._list_of(connection), self._list(lambda caller: caller.is_free)
        left = self._list(lambda caller: caller.is_reset or self._clock() - caller.last > self._idle_s)
        for callers in (mine, free, left):
            if same := [caller for caller in callers if caller.says(instruction)]:
                if callers is not mine and (mixed := self._find_mixed(connection, same)):
                    self._on_mixed([caller.name for caller in mixed])
                return same[0]
        return self._choose_for_new_task(connection, instruction, mine, free)

    def _choose_for_new_task(
        self, connection: Any, instruction: str | None, mine: list[_Caller], free: list[_Caller]
    ) -> _Caller:
        """A robot that had another task before, unless two tasks alternate: then they are two robots'."""
        if not mine and (mixed := self._find_mixed(connection, free)):
            return self._add(mixed)
        around = self._list_around(mine or free)
        for caller in (mine or free) if connection is not None else []:
            if not self._alternates(caller, instruction):
                if len(around) > 1:  # it may be the task of any of them
                    self._on_split([each.name for each in around], caller.name)
                return caller
        return self._add(around)

    def _find_mixed(self, connection: Any, callers: list[_Caller]) -> list[_Caller]:
        """Those of `callers`, the last one first, that were here at the same time, where a new connection may be any of
        them; [] where it is surely the last one's. A client that opens one for each request was here a moment ago.
        """
        if connection is None or not callers:
            return []
        last, around = callers[0], self._list_around(callers)
        is_next = last.num_asked == 1 and self._clock() - last.last < _RECENT_S
        keeps_connections = any(caller.num_asked > 1 for caller in around)
        return around if len(around) > 1 and keeps_connections and not is_next else []

    def _list_around(self, callers: list[_Caller]) -> list[_Caller]:
        """Those of `callers`, the last one first, that were here at the same time as the last one."""
        return [caller for caller in callers if callers[0].last - caller.last <= self._idle_s]

    def _alternates(self, caller: _Caller, instruction: str | None) -> bool:
        before, last = caller.before
        return before == instruction and self._clock() - last < ALTERNATES_S

    def _list_of(self, connection: Any) -> list[_Caller]:
        """Those whose last request came over this connection; none where a proxy shares it among robots."""
        return [] if connection is None else self._list(lambda caller: caller.connection is connection)

    def _list(self, is_wanted: Callable[[_Caller], bool]) -> list[_Caller]:
        """The last one to call first."""
        return sorted(filter(is_wanted, self._callers.values()), key=lambda caller: -caller.last)

    def _add(self, before: Sequence[_Caller] = ()) -> _Caller:
        """A new caller, with the place of the one that has been free longest where there are too many.

        before: those of which it may have been one.
        """
        free = self._list(lambda caller: caller.is_free)
        if len(self._callers) > self._max_robots and free:
            del self._callers[free[-1].name]
            self._on_mixed([free[-1].name])
        names = (DEFAULT_ROBOT if number == 1 else f"{DEFAULT_ROBOT}.{number}" for number in range(1, 10**6))
        caller = _Caller(next(name for name in names if name not in self._callers))
        self._callers[caller.name] = caller
        if before:
            self._on_split([each.name for each in before], caller.name)
        return caller
