"""A request that a relay sends again, as it lost the answer, is answered from store and not carried out twice.

A relay numbers its stations' connections, and the requests of each (see relay.py). A connection asks one thing at a
time, so its newest answer is all that can be asked for again. A request that failed is carried out again.
"""

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flask import Response

from vlm_local.errors import RequestError
from vlm_local.relay import HEADER
from vlm_local.server.access import take_place

_MARK = re.compile(r"([^\W_]{1,16})-(\d{1,9})")  # a connection's name, a request's number
_WAIT_S = 0.25  # between two looks whether the one who asked again is still there


@dataclass(eq=False)
class RelayedConnection:
    """A station's connection to a relay. It outlives those of the relay, of which `latest` is the last one.

    number: of its newest request. digest: of that request. answer: to it, None before there is one or where it failed.
    turn: held while it is carried out.
    """

    latest: Any = None
    number: int = 0
    digest: bytes = b""
    answer: Response | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_open(self) -> bool:
        return self.latest is not None and self.latest.is_open


class Repeats:
    """The newest answer of each relayed connection. Any thread may use it."""

    def __init__(self, most: int, most_waiting: int):
        """most: connections that are kept; the one longest unused goes first.

        most_waiting: requests that wait for their first sending to be answered, as each holds a thread.
        """
        self._most = most
        self._places = threading.BoundedSemaphore(most_waiting)
        self._connections: dict[str, RelayedConnection] = {}
        self._lock = threading.Lock()

    def find(self, mark: str, latest: Any) -> tuple[RelayedConnection, int]:
        """The relayed connection and the request's number. mark: value of the header. latest: as CONNECTION.

        Raises RequestError for a mark that no relay makes.
        """
        match = _MARK.fullmatch(mark)
        if match is None:
            raise RequestError(f"{HEADER}: expected a relay's CONNECTION-NUMBER, got {mark[:40]!r}")
        name, number = match.groups()
        with self._lock:
            connection = self._connections.pop(name, None) or RelayedConnection()
            self._connections[name] = connection
            connection.latest = latest
            idle = [other for other, each in self._connections.items() if not each.turn.locked() and other != name]
            for other in idle[: max(0, len(self._connections) - self._most)]:
                del self._connections[other]
        return connection, int(number)

    def answer(
        self, connection: RelayedConnection, number: int, request: bytes, is_gone: Callable, carry_out: Callable
    ) -> tuple[Response, bool]:
        """The answer, and whether it is from store. request: path and body. is_gone: whether nobody waits any more.
        carry_out: gives the answer, raises where it fails.

        Raises RequestError: 409 for a number whose request was another one, 499 where `is_gone` came first, 503 where
        too many wait.
        """
        if not connection.turn.acquire(blocking=False):  # the same request is under way
            self._wait(connection.turn, is_gone)
        try:
            digest = hashlib.sha256(request).digest()
            if number == connection.number and digest == connection.digest and connection.answer is not None:
                return connection.answer, True
            if number < connection.number or (number == connection.number and digest != connection.digest):
                raise RequestError(f"{HEADER}: request {number} was another one", 409)
            connection.number, connection.digest, connection.answer = number, digest, None
            connection.answer = response = carry_out()
            return response, False
        finally:
            connection.turn.release()

    def _wait(self, turn: threading.Lock, is_gone: Callable) -> None:
        refusal = f"{HEADER}: too many requests that were sent again are waiting; send one at a time"
        with take_place(self._places, refusal):
            while not turn.acquire(timeout=_WAIT_S):
                if is_gone():
                    raise RequestError("the client went away while it waited", 499)
