"""The app on a socket: waitress, its thread, and an orderly end."""

import socket
import threading
from functools import partial

from flask import Flask
from waitress.server import create_server
from waitress.task import ThreadedTaskDispatcher
from waitress.wasyncore import close_all, poll2

from vlm_local.errors import ConfigError
from vlm_local.server.answers import MAX_QUESTIONS
from vlm_local.server.connections import MAX_CONNECTIONS, PACE_S, Channel
from vlm_local.server.live import MAX_VIEWERS
from vlm_local.server.service import Service
from vlm_local.wire import MAX_BODY

_SPARE_THREADS = 4  # for what is refused at once, and /health
_READ_AT_ONCE = 2**18  # a 256x256 request in two reads
_KEEP_IN_MEMORY = 2**23  # larger bodies wait in a temporary file
_SPARE_CONNECTIONS = 64  # where all others have a request that is being answered
_LOOK_EVERY_S = 1.0  # at least, for connections that are too slow
_IDLE_CONNECTION_S = 300  # a person resets the scene between two episodes


def bind(host: str, port: int) -> socket.socket:
    """Take the port before anything slow happens. port: 0 for any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error}; choose another --port, 0 takes any that is free"
        ) from None


class _Threads:
    """Waitress's dispatcher, twice: pages and questions, however many and slow, hold no thread that a robot needs."""

    def __init__(self, num_robots: int, num_others: int):
        """Threads of each kind, to which spare ones are added."""
        self._robots, self._others = ThreadedTaskDispatcher(), ThreadedTaskDispatcher()
        self._robots.set_thread_count(num_robots + _SPARE_THREADS)
        self._others.set_thread_count(num_others + _SPARE_THREADS)

    def add_task(self, channel: Channel) -> None:
        (self._robots if channel.is_urgent else self._others).add_task(channel)

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5) -> None:
        for threads in (self._robots, self._others):
            threads.shutdown(cancel_pending, timeout)


class HTTPServer:
    """Serves an app made by create_app on a bound socket, from a thread of its own."""

    def __init__(self, app: Flask, listener: socket.socket):
        self.service: Service = app.extensions["vlm_local"]
        host, self.port = listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        self.url = f"http://{host}:{self.port}"
        self._sockets: dict = {}  # of waitress: the listener and all connections
        self._server = create_server(
            app,
            map=self._sockets,
            sockets=[listener],
            _dispatcher=_Threads(2 * self.service.settings.max_robots, MAX_VIEWERS + MAX_QUESTIONS),
            max_request_body_size=MAX_BODY,
            inbuf_overflow=_KEEP_IN_MEMORY,
            recv_bytes=_READ_AT_ONCE,
            channel_timeout=_IDLE_CONNECTION_S,
            channel_request_lookahead=1,  # notices that a client went away while it waits
            connection_limit=MAX_CONNECTIONS + _SPARE_CONNECTIONS,
            max_request_header_size=2**14,
            ident=None,
        )
        self._server.channel_class = partial(Channel, self.service.settings)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Waitress's loop, which also wakes for the next read of a large body."""
        while self._sockets:
            channels = list(self._server.active_channels.values())
            is_paced = any(channel.has_large_body for channel in channels)
            poll2(PACE_S if is_paced else _LOOK_EVERY_S, self._sockets)

    def stop(self) -> None:
        """Close every connection, after drain() has let those inside leave."""
        self._server.task_dispatcher.shutdown(timeout=1)
        try:
            self._server.trigger.pull_trigger(lambda: close_all(self._sockets))
        except OSError:  # the loop has closed its own pipe: nobody else uses the sockets any more
            close_all(self._sockets, ignore_all=True)
        self._thread.join(2)
