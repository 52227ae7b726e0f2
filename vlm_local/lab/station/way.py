"""The way from a station to a policy server: the relay and the tunnel that may stand in between."""

import contextlib
import socket
import struct
import threading
import time

from vlm_local.lab.station.client import split_url
from vlm_local.relay import Relay

BACK_S = 60.0  # for a server that is started again
_CHUNK = 2**16
_LINGER_0 = struct.pack("ii", 1, 0)  # close with a reset


class Link:
    """A tunnel that can drop: listens on a free port of 127.0.0.1 and passes connections on to `address`.

    Bytes go through, wait while it is silent, or every connection is reset.
    """

    def __init__(self, address: tuple[str, int]):
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._silent_until = self._broken_until = 0.0
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self, seconds: float) -> None:
        """Nothing goes through, and nobody is told."""
        self._silent_until = time.monotonic() + seconds

    def break_down(self, seconds: float) -> None:
        """Every connection ends with a reset, and so does each new one for so long."""
        self._broken_until = time.monotonic() + seconds
        self._reset()

    def wait_back(self) -> None:
        time.sleep(max(0.0, self._broken_until - time.monotonic()))

    def _reset(self) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            _end(each)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._reset()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if time.monotonic() < self._broken_until:
                _end(near)
                continue
            try:
                far = socket.create_connection(self._address)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._sockets += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                while (left := self._silent_until - time.monotonic()) > 0:
                    time.sleep(left)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
        connection.shutdown(socket.SHUT_RD)
        connection.close()


class ServerGone(Exception):
    """The server does not come back, so there is nothing to go on with."""


class Way:
    """url: where the station asks. tunnel: the one that drops, behind the relay, or None."""

    def __init__(self, url: str, has_tunnel: bool, has_relay: bool):
        address, path = split_url(url)
        self._server = address
        self.tunnel = Link(address) if has_tunnel else None
        if self.tunnel is not None:
            address = "127.0.0.1", self.tunnel.port
        self._relay = Relay(address, ("127.0.0.1", 0)) if has_relay else None
        if self._relay is not None:
            address = "127.0.0.1", self._relay.server_port
            threading.Thread(target=self._relay.serve_forever, args=(0.05,), daemon=True).start()
        is_direct = self.tunnel is None and self._relay is None
        self.url = url if is_direct else f"http://{address[0]}:{address[1]}{path}"

    def wait_back(self) -> None:
        """Until the server can be connected to. Raises ServerGone where that takes longer than BACK_S."""
        if self.tunnel is not None:
            self.tunnel.wait_back()
        end = time.monotonic() + BACK_S
        while time.monotonic() < end:
            try:
                socket.create_connection(self._server, 1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise ServerGone(f"no connection to {self._server[0]}, port {self._server[1]}, for {BACK_S:g} s")

    def close(self) -> None:
        if self._relay is not None:
            self._relay.shutdown()
            self._relay.server_close()
        if self.tunnel is not None:
            self.tunnel.close()
