"""The websocket door: OpenPI's dialect at /, vla-eval's at /vla-eval, RoboArena's at /roboarena.

A connection is a robot of its own, named wsN, unless its path names one (/s/ROBOT). A new connection begins an
episode. Every request passes the gate, limits, safety and recording that /act has.
"""

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from vlm_local.errors import RequestError
from vlm_local.server.access import Address, RateLimit, check_origin, parse_address, read_token
from vlm_local.server.dialects import DIALECTS, INTERNAL_ERROR, ROUTES, Client
from vlm_local.server.frames import MAX_FRAME
from vlm_local.server.peers import Peer, SmallFrames
from vlm_local.server.service import Service

logger = logging.getLogger(__name__)
_library = logging.getLogger(__name__ + ".connections")
_library.setLevel(logging.CRITICAL)  # it writes a traceback for each probe that connects and says nothing

MAX_HORIZON = 100  # steps in an answer; OpenPI's clients play 5 to 10
MAX_CONNECTIONS = 64  # each holds two threads
_HANDSHAKE_S = 10.0
_CLOSE_S = 1.0  # for clients to hear of the end
_RETRY_S = 0.1
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED)  # errors of accept


class WebsocketDoor:
    """Answers websocket clients, each connection in a thread of its own."""

    def __init__(self, service: Service, listener: socket.socket, horizon: int):
        """listener: bound. horizon: steps in an answer of OpenPI's dialect, for all of which the phrase holds."""
        listener.listen()
        self._service = service
        self._horizon = horizon
        self._peers: list[Peer] = []
        service.budget.listings.append(lambda: self._peers)
        self._names: set[str] = set()
        rate = service.settings.rate_limit
        self._limit = None if rate is None else RateLimit(rate)
        self._lock = threading.Lock()
        self.port = listener.getsockname()[1]
        guarded: Any = _Listener(listener, self._make_room)  # of a socket, what `serve` uses of it
        self._server: Server = serve(
            self._talk,
            sock=guarded,
            process_request=self._admit,
            process_response=_limit_frames,
            compression=None,
            max_size=MAX_FRAME,
            max_queue=1,
            open_timeout=_HANDSHAKE_S,
            ping_interval=None,  # a busy model would be taken for a dead one
            server_header=None,
            logger=_library,
        )
        self._thread = threading.Thread(target=self._server.serve_forever, name="websocket", daemon=True)
        self._thread.start()

    def close(self) -> None:
        ending = threading.Thread(target=self._server.shutdown, name="websocket-end", daemon=True)
        ending.start()
        ending.join(_CLOSE_S)  # it waits for clients, also for those that read nothing
        with self._lock:
            peers = list(self._peers)
        for peer in peers:
            peer.hang_up()
        ending.join(_CLOSE_S)

    def _make_room(self, accepted: socket.socket) -> Peer:
        """Count a new connection; where there are too many, one of those ends that were never given an action, or else
        wait for their client. Where all are robots that wait for us, the new one ends.

        Of those without an action, a quarter of all places is for handshakes, which take a robot a moment; whoever has
        no token comes no further, and loses the others to who has.
        """
        peer = Peer(accepted, self._service.budget)
        with self._lock:
            peers = [peer for peer in self._peers if peer.fileno() >= 0 and not peer.is_ended]
            if len(peers) >= MAX_CONNECTIONS:
                resting = [peer for peer in peers if not peer.has_acted or peer.waits_since is not None]
                are_few = sum(not peer.is_open for peer in resting) <= MAX_CONNECTIONS // 4
                min(resting, key=lambda peer: peer.rank(spares_handshakes=are_few), default=peer).hang_up()
            self._peers = [*peers, peer]
        return peer

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer probes by HTTP, refuse who may not enter, let all others in."""
        address = self._find_address(request)
        try:
            address.check_robot()
            _check_entry(self._service, request.headers, connection.remote_address[0], address)
        except RequestError as error:
            return connection.respond(HTTPStatus(error.status), f"{error}\n")
        if address.route in ("/healthz", "/health"):
            state = self._service.state
            status = HTTPStatus.OK if state == "healthy" else HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, f"{state}\n")
        if address.route not in DIALECTS:
            return connection.respond(HTTPStatus.NOT_FOUND, f"there is no {address.route}; use {ROUTES}\n")
        return None

    def _find_address(self, request: Request) -> Address:
        return parse_address(request.path.partition("?")[0], self._service.settings.prefix)

    def _talk(self, connection: ServerConnection) -> None:
        assert connection.request is not None  # it was admitted
        address = self._find_address(connection.request)
        peer = connection.socket
        assert isinstance(peer, Peer)  # _Listener gives no others
        peer.is_open = True
        with self._naming(address.robot) as robot:
            client = Client(connection, peer, robot, self._service, self._limit)
            try:
                DIALECTS[address.route](client, self._service, self._horizon)
            except ConnectionClosed:
                pass
            except Exception:
                logger.exception("the websocket connection of %s failed", robot)
                connection.close(INTERNAL_ERROR)

    @contextmanager
    def _naming(self, named: str | None) -> Iterator[str]:
        """The robot of a connection. Numbers are used again, so that a script that connects anew is the same robot."""
        if named is not None:
            yield named
            return
        with self._lock:
            robot = next(name for name in (f"ws{number}" for number in range(10**6)) if name not in self._names)
            self._names.add(robot)
        try:
            yield robot
        finally:
            with self._lock:
                self._names.discard(robot)


class _Listener:
    """A listening socket that makes a Peer of each connection before it has a thread."""

    def __init__(self, listener: socket.socket, build_peer: Callable[[socket.socket], Peer]):
        self._listener, self._build_peer = listener, build_peer

    def accept(self):
        """Raises OSError only once the socket is closed, which `serve` takes any error for."""
        while True:
            try:
                accepted, address = self._listener.accept()
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                time.sleep(_RETRY_S)
                continue
            return self._build_peer(accepted), address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


def _limit_frames(connection: ServerConnection, request: Request, response: Response) -> None:
    """Called when the handshake is answered, before the first frame is looked at."""
    assert isinstance(connection.socket, Peer)
    connection.protocol.extensions.append(SmallFrames(connection.socket))


def _check_entry(service: Service, headers: Headers, remote: str, address: Address) -> None:
    """Raises RequestError as the HTTP routes do. OpenPI's clients say "Api-Key KEY" where others say "Bearer KEY"."""

    def get(name: str) -> str | None:
        return ", ".join(headers.get_all(name)) or None  # one that comes twice is joined, as by HTTP's server

    settings, authorization = service.settings, get("Authorization") or ""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() == "api-key":
        authorization = f"Bearer {key}"
    token = read_token(address.token, authorization)
    # "POST": who says no Origin is no page, for browsers say it with every websocket
    check_origin("POST", address.route, get, settings.gate.knows(token), settings.names)
    if address.route not in ("/health", "/healthz"):
        settings.gate.check(remote, token)
