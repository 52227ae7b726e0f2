"""The way from a station to a policy server: the relay and the tunnel that may stand in between."""

import socket
import threading
import time

from vlm_local.lab.station.client import split_url
from vlm_local.lab.station.link import Link
from vlm_local.relay import Relay

BACK_S = 60.0  # for a server that is started again


class ServerGone(Exception):
    """The server does not come back, so there is nothing to go on with."""


class Way:
    """url: where the station asks. A tunnel that drops comes after the relay, which is on the station's side."""

    def __init__(self, url: str, has_tunnel: bool, has_relay: bool):
        address, path = split_url(url)
        self._server = address
        self._link = Link(address) if has_tunnel else None
        if self._link is not None:
            address = "127.0.0.1", self._link.port
        self._relay = Relay(address, ("127.0.0.1", 0)) if has_relay else None
        if self._relay is not None:
            address = "127.0.0.1", self._relay.server_port
            threading.Thread(target=self._relay.serve_forever, args=(0.05,), daemon=True).start()
        is_direct = self._link is None and self._relay is None
        self.url = url if is_direct else f"http://{address[0]}:{address[1]}{path}"

    def fall_silent(self, seconds: float) -> None:
        if self._link is not None:
            self._link.fall_silent(seconds)

    def break_down(self, seconds: float) -> None:
        if self._link is not None:
            self._link.break_down(seconds)

    def wait_back(self) -> None:
        """Until the server can be connected to. Raises ServerGone where that takes longer than BACK_S."""
        if self._link is not None:
            self._link.wait_back()
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
        if self._link is not None:
            self._link.close()
