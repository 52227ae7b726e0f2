"""A tunnel that can drop: bytes go through to a server, wait while it is silent, or every connection is reset."""

import contextlib
import socket
import struct
import threading
import time

_CHUNK = 2**16
_LINGER_0 = struct.pack("ii", 1, 0)  # close with a reset


class Link:
    """Listens on a free port of 127.0.0.1 and passes connections on to `address`."""

    def __init__(self, address: tuple[str, int]):
        self._address = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
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
