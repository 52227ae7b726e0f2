"""Limits on connections and bodies, before a request is worked on.

Threads: waitress's loop calls everything here in its one thread, except `Channel.service`, which runs in a worker
thread of PoolDispatcher, and what `Budget` asks of a channel. Nothing in the loop's thread waits.

A request must arrive within REQUEST_S. Its headers decide whether its body is kept. Large bodies take turns, and while
a robot is answered a very large one is read at 25 MB/s at most. The bodies and unsent answers of all connections share
a budget with websocket's frames (`vlm_local/server/budget.py`). Where no connection is free, a new one takes the place
of the one that has kept the server waiting longest.
"""

# The stubs of waitress leave out attributes that it has, and type some of them too narrowly to be replaced.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportIncompatibleVariableOverride=false

import json
import logging
import resource
import socket
import time
from contextlib import suppress
from http import HTTPStatus

from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.wasyncore import poll2

from vlm_local.bounds import MAX_LISTED
from vlm_local.errors import RequestError
from vlm_local.plain import hide_token
from vlm_local.server.access import ADDRESS, CONNECTION, FULL_PATH, Address, longest_body, parse_address, read_token
from vlm_local.server.budget import Budget
from vlm_local.server.parser import Parser
from vlm_local.server.service import LARGE_BODY, ServerSettings
from vlm_local.wire import MAX_BODY

logger = logging.getLogger(__name__)

REQUEST_S = 10.0  # from a request's first byte, or the connection's begin, to its last byte
UNREAD_S = 30.0  # an answer of which the client takes nothing
MAX_CONNECTIONS = 512
PACE_S = 0.01  # between two reads of a body above MAX_LISTED, while a robot is answered: 25 MB/s
if (_files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) != resource.RLIM_INFINITY:
    MAX_CONNECTIONS = min(MAX_CONNECTIONS, _files // 2)  # the model, the recording and large bodies take files, too

_MAX_AHEAD = 8  # requests of a connection before the first is answered; 256 kB of short ones take 0.5 s to parse
_LARGE_AT_ONCE = 4  # bodies above LARGE_BODY that are read between two looks at all connections
_LOOK_EVERY_S = 1.0  # at least, for connections that are too slow
_SPARE_THREADS = 4  # in each pool, for what is refused at once
_OF_ROBOTS = ("/act", "/reset")
_AT_ONCE = ("/hold", "/release", "/health")  # neither the model nor a robot's place is needed for these


class _ErrorTask(ErrorTask):
    """The answer to what waitress refuses by itself (not HTTP, too large): JSON like every other error."""

    def execute(self):
        error = self.request.error
        status = 400 if error.code == 501 else error.code  # an unknown Transfer-Encoding is the client's doing
        reason = f"{error.reason}: {error.body}"
        if status == 413:
            reason = f"the body is larger than the {MAX_BODY} bytes allowed"
        body = json.dumps({"error": reason}).encode() + b"\n"
        self.status = f"{status} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):
    """Tells the application which connection a request came over, and what its path means."""

    def get_environment(self):
        environ = super().get_environment()
        address = self.channel.find_address(self.request)
        environ |= {CONNECTION: self.channel, ADDRESS: address, FULL_PATH: self.request.full_path}
        environ["PATH_INFO"] = address.route  # what is routed and logged
        return environ


class Channel(HTTPChannel):
    """One connection."""

    error_task_class = _ErrorTask
    task_class = _Task

    def __init__(self, settings: ServerSettings, budget: Budget, server, *args, **kwargs):
        _make_room(list(server.active_channels.values()))
        self._settings, self._budget = settings, budget
        self._opened = time.monotonic()
        self._nothing_unsent = time.monotonic()  # when that was seen last
        self._has_asked = self._is_ended = False
        self._last_read = self.last_turn = 0.0  # monotonic seconds
        self.has_turn = False  # to read on in a large body; given by run_loop
        self.serves_robot = False  # or says how the server is
        self.parser_class = self._build_parser
        super().__init__(server, *args, **kwargs)

    @property
    def last_activity(self) -> float:
        """Monotonic seconds. Waitress sets it by the wall clock, which is put right by hours while a robot drives."""
        return self._last_activity

    @last_activity.setter
    def last_activity(self, wall_clock: float) -> None:
        self._last_activity = time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether the client can still send, also where the loop has not read yet that it closed. For any thread."""
        if self.socket is None:
            return False
        try:
            return self.connected and self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return self.connected
        except OSError:
            return False

    @property
    def waited(self) -> tuple[bool, float]:
        """Whether it has never asked anything, and seconds waited for the client; the largest makes room for others."""
        if self.request is not None:
            return not self._has_asked, time.monotonic() - self.request.began
        if self.total_outbufs_len:
            return False, time.monotonic() - self._nothing_unsent
        if self._has_asked:
            return False, time.monotonic() - self.last_activity
        return True, time.monotonic() - self._opened

    @property
    def route(self) -> str:
        """Of the request to be answered."""
        return self.find_address(self.requests[0]).route

    @property
    def num_held(self) -> int:
        """Bytes of bodies that came and of answers that are still to be sent; 0 once it was told to end."""
        if self._is_ended:
            return 0
        requests = sum(request.num_held for request in (self.request, *self.requests) if request is not None)
        return requests + self.total_outbufs_len

    @property
    def may_end(self) -> bool:
        """Whether a request is on its way, or an answer."""
        return not self._is_ended and (self.request is not None or self.total_outbufs_len > 0)

    def end(self) -> None:
        """Have the loop hang up, unless the request has come in by then."""
        self._is_ended = True
        self.server.pull_trigger()

    @property
    def has_large_body(self) -> bool:
        """Whether a body above LARGE_BODY is on its way."""
        request = self.request
        return request is not None and max(request.content_length, request.body_bytes_received) > LARGE_BODY

    def readable(self):
        """Asked before every wait for sockets, once a second at least."""
        if self._is_ended:
            self._is_ended = False
            if self.may_end:
                self.refuse(
                    HTTPStatus.SERVICE_UNAVAILABLE, "too many large bodies are on their way; send smaller pictures"
                )
                return False
        never_asked, waited_s = self.waited
        if not self.requests and (self.request is not None or never_asked) and waited_s > REQUEST_S:
            self.refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request did not come within {REQUEST_S:g} s")
            return False
        now = time.monotonic()
        if not self.total_outbufs_len:
            self._nothing_unsent = now
        elif now - max(self._nothing_unsent, self.last_activity) > UNREAD_S:
            self.handle_close()
            return False
        return super().readable() and not self._gives_way()

    def _gives_way(self) -> bool:
        """Whether a large body waits: its sender and its reader would take the processors that the model needs."""
        if self.request is None or not self.has_large_body:
            return False
        if not self.has_turn:
            return True
        if self.request.content_length <= MAX_LISTED or time.monotonic() - self._last_read >= PACE_S:
            return False
        return any(channel.serves_robot for channel in list(self.server.active_channels.values()))

    def received(self, data):
        self._last_read = time.monotonic()
        super().received(data)
        self._budget.keep()

    def service(self):
        self._has_asked = True
        self.serves_robot = self.route in _OF_ROBOTS + _AT_ONCE
        try:
            super().service()
        finally:
            self.serves_robot = False

    def refuse(self, status: HTTPStatus, reason: str) -> None:
        """Hang up; the reason is for a client that has begun a request and waits for no other answer."""
        is_heard = self.request is not None and not self.requests and not self.total_outbufs_len
        if is_heard and self.socket is not None:
            logger.warning("a connection from %s is closed: %s", self.addr[0], reason)
            body = json.dumps({"error": reason}) + "\n"
            head = f"HTTP/1.1 {status} {status.phrase}\r\nContent-Type: application/json\r\n"
            with suppress(OSError):
                self.socket.send(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        self.handle_close()

    def handle_close(self):
        super().handle_close()
        if self.request is not None:
            self.request.drop_body()  # both are in cycles, and an idle thread keeps the channel that it worked for last

    def find_address(self, request: Parser) -> Address:
        """What the path means, looked at once."""
        if request.address is None:
            request.full_path = "/" + request.path.lstrip("/")
            request.address = parse_address(request.full_path, self._settings.prefix)
            request.path = hide_token(request.address.route)  # waitress logs it where a client has hung up
        return request.address

    def _build_parser(self, adj) -> Parser:
        fault = "too many requests came before one was answered" if len(self.requests) >= _MAX_AHEAD else ""
        return Parser(adj, self._is_wanted, fault)

    def _is_wanted(self, request: Parser) -> bool:
        """Whether the body is kept, by robot's name, token and length; otherwise the application answers why not."""
        try:
            address = self.find_address(request)
            address.check_robot()
            token = read_token(address.token, request.headers.get("AUTHORIZATION", ""))
            self._settings.gate.check(self.addr[0], token)
        except RequestError:
            return False
        return request.content_length <= longest_body(address.route)


class PoolDispatcher:
    """Three of waitress's thread pools. However many they are and however long they take, pages and questions hold no
    thread that a robot needs, and robots' requests none that a person needs to stop a robot.
    """

    def __init__(self, num_robots: int, num_others: int):
        at_once, robots, self._others = self._pools = [ThreadedTaskDispatcher() for _ in range(3)]
        self._pool_of: dict[str, ThreadedTaskDispatcher] = dict.fromkeys(_AT_ONCE, at_once) | dict.fromkeys(
            _OF_ROBOTS, robots
        )
        for pool, num_threads in zip(self._pools, (0, num_robots, num_others), strict=True):
            pool.set_thread_count(num_threads + _SPARE_THREADS)

    def add_task(self, channel: Channel) -> None:
        self._pool_of.get(channel.route, self._others).add_task(channel)

    def shutdown(self, cancel_pending: bool = True, timeout: int = 5) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_pending, timeout)


def run_loop(server, sockets: dict) -> None:
    """Waitress's loop over the listener and all connections, which also wakes for the next read of a large body.

    After each read this thread waits for the interpreter's lock, which a parser holds for 0.1 s at a time. So large
    bodies take turns: a stop that comes beside 60 of them would else wait for 60 reads.
    """
    while sockets:
        large = [channel for channel in list(server.active_channels.values()) if channel.has_large_body]
        large.sort(key=lambda channel: channel.last_turn)
        for place, channel in enumerate(large):
            channel.has_turn = place < _LARGE_AT_ONCE
            if channel.has_turn:
                channel.last_turn = time.monotonic()
        poll2(PACE_S if large else _LOOK_EVERY_S, sockets)


def _make_room(channels: list[Channel]) -> None:
    waiting = [channel for channel in channels if not channel.requests]  # it is the client's turn
    if len(channels) >= MAX_CONNECTIONS and waiting:
        longest = max(waiting, key=lambda channel: channel.waited)
        longest.refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections are open")
