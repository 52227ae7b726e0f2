"""A whole server, from the first socket to an orderly end: the app on waitress, tunnel, recording, signals."""

import itertools
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flask import Flask
from waitress.server import create_server
from waitress.wasyncore import close_all

from vlm_local.assembly import Policies
from vlm_local.errors import ConfigError
from vlm_local.files import list_missing, remove_unused
from vlm_local.processes import trim_heaps
from vlm_local.server.connections import MAX_CONNECTIONS, Channel, PoolDispatcher, run_loop
from vlm_local.server.live import MAX_VIEWERS
from vlm_local.server.observers import ObservedApp
from vlm_local.server.recorder import explain_refusal
from vlm_local.server.routes import MAX_QUESTIONS
from vlm_local.server.service import ServerSettings, Service
from vlm_local.server.state import find_previous
from vlm_local.server.tunnel import Tunnel, TunnelTarget
from vlm_local.server.websocket import MAX_HORIZON, WebsocketDoor
from vlm_local.wire import MAX_BODY

logger = logging.getLogger(__name__)

GRACE_S = 4.0  # for what is in flight when the server is told to stop
_ANSWER_S = 1.0  # for the 503 of what was not done by then
_FLUSH_S = 5.0  # for the recording
_TRIM_EVERY_S = 5.0
_READ_AT_ONCE = 2**18  # a 256x256 request in two reads
_KEEP_IN_MEMORY = 2**23  # larger bodies wait in a temporary file
_ACCEPT_AT_ONCE = 8  # waitress accepts one between two looks at all connections, which take 5 ms where there are 500
_SPARE_CONNECTIONS = 64  # where all others have a request that is being answered
_OF_EVERY_RUN = ("meta.json", "state.json")  # files of one in which nothing happened
_IDLE_CONNECTION_S = 300  # a person resets the scene between two episodes


def bind(host: str, port: int) -> socket.socket:
    """Take the port before anything slow happens. port: 0 for any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        fault = str(error).partition(" (while attempting")[0]  # Python adds the address to some
        raise ConfigError(
            f"cannot listen on {host} port {port}: {fault}; choose another --port, 0 takes any that is free"
        ) from None


def _reserve(host: str, port: int) -> socket.socket:
    """Take a port without listening: clients are refused until the model is loaded, as some wait for."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot use {host} port {port}: {error}; choose another --websocket-port") from None
    return listener


def _name_host(host: str) -> str:
    """As it stands in a URL of this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def _repeat(do: Callable[[], object], count: int) -> None:
    for _ in range(count):
        do()


class HTTPServer:
    """Serves an app made by create_app on a bound socket, from a thread of its own."""

    def __init__(self, app: Flask, listener: socket.socket):
        self.service: Service = app.extensions["vlm_local"]
        host, self.port = listener.getsockname()[:2]
        self.url = f"http://{_name_host(host)}:{self.port}"
        self._sockets: dict = {}  # of waitress: the listener and all connections
        # Waitress asks for add_task and shutdown of it, and has more attributes than its stubs know.
        # One request of a robot runs, one waits, and a relay may have sent one again.
        dispatcher: Any = PoolDispatcher(3 * self.service.settings.max_robots, MAX_VIEWERS + MAX_QUESTIONS)
        self._server: Any = create_server(
            app,
            map=self._sockets,
            sockets=[listener],
            _dispatcher=dispatcher,
            max_request_body_size=MAX_BODY,
            inbuf_overflow=_KEEP_IN_MEMORY,
            recv_bytes=_READ_AT_ONCE,
            channel_timeout=_IDLE_CONNECTION_S,
            channel_request_lookahead=1,  # notices that a client went away while it waits
            connection_limit=MAX_CONNECTIONS + _SPARE_CONNECTIONS,
            max_request_header_size=2**14,
            ident=None,
        )
        self._server.channel_class = partial(Channel, self.service.settings, self.service.budget)
        self._server.handle_accept = partial(_repeat, self._server.handle_accept, _ACCEPT_AT_ONCE)
        close_idle = self._server.maintenance
        self._server.maintenance = lambda wall_clock: close_idle(time.monotonic())  # as Channel.last_activity has it
        self.service.budget.listings.append(lambda: list(self._server.active_channels.values()))
        self._thread = threading.Thread(target=run_loop, args=(self._server, self._sockets), name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close every connection, after drain() has let those inside leave."""
        self._server.task_dispatcher.shutdown(timeout=1)
        try:
            self._server.trigger.pull_trigger(lambda: close_all(self._sockets))
        except OSError:  # the loop has closed its own pipe: nobody else uses the sockets any more
            close_all(self._sockets, ignore_all=True)
        self._thread.join(2)


@dataclass(frozen=True)
class RunOptions:
    """What a server does beside answering requests.

    record: where runs are recorded, each start in a folder of its own; None records nothing.
    max_record_bytes: above it the oldest episodes of the run are deleted. websocket_port: 0 for any that is free, None
    for no websocket. horizon: as WebsocketDoor takes it, None for the steps that a phrase is held.
    """

    record: Path | None = None
    max_record_bytes: int | None = None
    tunnel: TunnelTarget | None = None
    websocket_port: int | None = None
    horizon: int | None = None


class RunningServer:
    """Answers /health from the start, robots once the model is loaded."""

    def __init__(self, policies: Policies, settings: ServerSettings, options: RunOptions, listener: socket.socket):
        self._policies = policies
        self._options = options
        port = listener.getsockname()[1]
        previous = None if options.record is None else find_previous(options.record, port)
        names = {socket.gethostname().lower()} | ({options.tunnel.host.lower()} if options.tunnel else set())
        settings = replace(settings, names=settings.names | names)
        self._websocket: WebsocketDoor | None = None
        self._websocket_listener: socket.socket | None = None
        self.websocket_url: str | None = None
        if options.websocket_port is not None:
            host = listener.getsockname()[0]
            self._websocket_listener = _reserve(host, options.websocket_port)
            websocket_port = self._websocket_listener.getsockname()[1]
            self.websocket_url = f"ws://{_name_host(host)}:{websocket_port}{settings.prefix}/"
        self._made = [] if options.record is None else list_missing(options.record)
        run = self.run_folder = None if options.record is None else _make_run(options.record, policies.metadata)
        self._observed = ObservedApp(policies, settings, run, options.max_record_bytes, previous, port)
        self._service = self._observed.service
        if (held := self._service.states.describe()) != {"all": None, "robots": {}}:
            logger.warning("still held from %s, until POST /release: %s", previous, held)
        self._http = HTTPServer(self._observed.app, listener)
        self.url = self._http.url
        tunnel = self._tunnel = None if options.tunnel is None else Tunnel(options.tunnel, self._http.port)
        if tunnel is not None:
            self._service.report["tunnel"] = lambda: tunnel.state

    def wait_loaded(self, is_stopped: Callable[[], bool]) -> bool:
        """Wait for the model; False when `is_stopped` came first. Raises what the load raised."""
        worker = self._policies.worker
        while worker is not None and not worker.wait_loaded(0.1):
            if is_stopped():
                return False
        if self._websocket_listener is not None:
            held = self._policies.metadata.get("steps_per_phrase")  # a remote server may say anything
            horizon = self._options.horizon or (held if isinstance(held, int) and 0 < held <= MAX_HORIZON else 1)
            self._websocket = WebsocketDoor(self._service, self._websocket_listener, horizon)
        return True

    def stop(self) -> bool:
        """Wait for requests in flight, refuse those left, flush the recording. True when no forward runs any more."""
        self._observed.end_streams()
        if not self._service.drain(GRACE_S):
            logger.warning("what did not finish within %g s gets a 503", GRACE_S)
        worker = self._policies.worker
        has_failed = worker is not None and worker.state == "failed"
        ended = worker is None or worker.close()
        self._service.drain(_ANSWER_S)
        if not self._observed.close(_FLUSH_S):
            logger.error("the recording could not be written to its end within %g s", _FLUSH_S)
        if self._tunnel is not None:
            self._tunnel.close()
        if self._websocket is not None:
            self._websocket.close()
        self._http.stop()
        if has_failed and self.run_folder is not None and not self._service.states.is_known:
            remove_unused([self.run_folder / "episodes", self.run_folder, *self._made], _OF_EVERY_RUN)
        return ended


def serve_until_stopped(
    server: RunningServer, tell_loading: Callable[[], None], tell_ready: Callable[[], None]
) -> bool:
    """Serve until SIGTERM or SIGINT, a second of which ends the process at once. Returns as `stop`.

    tell_loading, tell_ready: called once a signal ends the server in order, and once the model is loaded.
    """
    stopped = threading.Event()

    def stop(number, frame):
        stopped.set()
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    try:
        tell_loading()
        if server.wait_loaded(stopped.is_set):
            tell_ready()
            while not stopped.wait(_TRIM_EVERY_S):
                # Requests of 200 kB leave holes in the heap that glibc never gives back: without this, memory
                # grows for hours.
                trim_heaps()
    finally:
        ended = server.stop()
    return ended


def _make_run(parent: Path, metadata: Mapping[str, Any]) -> Path:
    """A new folder for this start, by time and model; servers that start in the same second get one each."""
    model = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(metadata.get("model") or "model").rpartition("/")[2])
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{model}"
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise explain_refusal(parent, error) from None
    raise AssertionError("the count never ends")
