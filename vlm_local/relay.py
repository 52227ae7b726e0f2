"""Stands on the station's side of a tunnel and hides from the station that the tunnel drops. One file, no packages,
Python 3.8 or later.

    python3 relay.py http://127.0.0.1:8001 --port 8000

The station asks port 8000, the relay asks the tunnelled port 8001. AutoEval's client has no time-out and ends its job
on a broken connection, so a request is held while the tunnel is down, 30 s at most, and sent again when it is back.
The same goes for a policy server that is started again: it says 503 with Retry-After, or nothing at all. Each request
carries a header with a name for the station's connection and the number of the request in it. The policy server
(vlm-local) answers a number that it has answered before from its store, so that nothing is done twice. Do not use it
before another policy server: a request whose answer was lost would be carried out again.
"""

import argparse
import contextlib
import http.client
import json
import os
import select
import socket
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HEADER = "Vlm-Local-Request"  # "CONNECTION-NUMBER": 16 hexadecimal digits; 1, 2, ... within that connection
HOLD_S = 30.0
MAX_CONNECTIONS = 64
FIRST_S = 10.0  # from a connection's begin to its first whole request; afterwards a station may rest for hours
MAX_BODY = 2**27  # bytes; the server has a limit of its own
LARGE_BODY, MAX_LARGE = 2**22, 2  # bytes; so many bodies above it are held at a time, so all take 512 MB at most

_HELD = {"POST": ("/act", "/reset", "/answer"), "GET": ("/health", "/metadata")}  # nothing else is passed on
_PROBE_EVERY_S, _PROBE_S = 5.0, 2.0  # while an answer is awaited it is asked whether the tunnel lives
_RETRY_S = 0.25
_TRANSFER_S = 30.0  # for the rest of a request or an answer that has begun
_ROOM_S = 1.0  # for the thread of a closed connection to end
_OF_ONE_LINK = ("connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade", "expect")


class LinkDown(Exception):
    """The tunnel was down for too long."""


class Upstream:
    """The way of one station's connection to the policy server. Not thread-safe."""

    def __init__(self, address, hold_s):
        """address: (host, port) of the tunnelled port."""
        self._address, self._hold_s = address, hold_s
        self._name, self._number = os.urandom(8).hex(), 0
        self._connection = None

    def ask(self, method, path, body, headers):
        """Status, content type and body of the answer. Raises LinkDown."""
        self._number += 1
        headers = {**headers, HEADER: f"{self._name}-{self._number}", "Content-Length": str(len(body))}
        began, is_down = time.monotonic(), False
        self._alive = began  # when the tunnel was known to work
        while True:
            answer = None
            try:
                *answer, comes_again = self._exchange(method, path, body, headers)
                reason = "the policy server is not ready" if comes_again else ""
            except (OSError, http.client.HTTPException) as error:
                self.close()
                reason = f"the tunnel is down: {str(error) or type(error).__name__}"
            held_s = time.monotonic() - self._alive
            if answer is not None and (not reason or held_s > self._hold_s):
                if is_down:
                    _tell(f"{path} is answered after {time.monotonic() - began:.1f} s")
                return answer
            if held_s > self._hold_s:
                raise LinkDown
            if not is_down:
                _tell(f"{path} is held, {reason}")
            is_down = True
            time.sleep(_RETRY_S)

    def close(self):
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _exchange(self, method, path, body, headers):
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self._address, timeout=_TRANSFER_S)
        self._connection.request(method, path, body, headers)
        self._wait(self._connection.sock)
        response = self._connection.getresponse()
        comes_again = response.status == 503 and "Retry-After" in response.headers
        return response.status, response.headers.get("Content-Type", "application/json"), response.read(), comes_again

    def _wait(self, connection):
        """Until an answer begins. A model may take its time; a tunnel may not. Raises OSError to send it again."""
        is_down = False
        while not select.select([connection], [], [], _RETRY_S if is_down else _PROBE_EVERY_S)[0]:
            if self._is_alive():
                if is_down:
                    raise ConnectionError("it was silent, and is back")
                self._alive = time.monotonic()
            elif time.monotonic() - self._alive > self._hold_s:
                raise TimeoutError("it is silent")
            else:
                is_down = True

    def _is_alive(self):
        """Whether the server answers at all."""
        probe = http.client.HTTPConnection(*self._address, timeout=_PROBE_S)
        with contextlib.closing(probe), contextlib.suppress(OSError, http.client.HTTPException):
            probe.request("GET", "/health")
            probe.getresponse().read()
            return True
        return False


class Relay(ThreadingHTTPServer):
    """Listens from the start; `serve_forever` answers.

    Where all places are taken, a new connection gets that of one whose next request is not here: one of those that have
    never asked anything, or else the one that has rested longest. A station whose connection was closed opens another.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream, listen=("127.0.0.1", 8000), hold_s=HOLD_S):
        """upstream: (host, port) of the tunnelled port. Raises OSError where `listen` cannot be had."""
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.handlers = set()  # one for each connection
        large_bodies = threading.BoundedSemaphore(MAX_LARGE)
        super().__init__(listen, partial(_Handler, self.handlers, large_bodies, upstream, hold_s))

    def process_request(self, request, client_address):
        if self._places.acquire(blocking=False) or (self._make_room() and self._places.acquire(timeout=_ROOM_S)):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def service_actions(self):
        """Called twice a second: ends connections whose client is too slow."""
        now = time.monotonic()
        for handler in list(self.handlers):
            if now > handler.due:
                handler.hang_up()

    def _make_room(self):
        """Whether a connection could be ended."""
        resting = [handler for handler in list(self.handlers) if handler.is_resting()]
        if resting:
            min(resting, key=lambda handler: (handler.has_asked, handler.since)).hang_up()
        return bool(resting)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a station that hung up is no failure
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection of a station, which lasts for its whole job.

    due: when the client must have sent, or taken, what it is about to. since: when the last request was answered.
    has_asked: whether one was passed on.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, handlers, large_bodies, upstream, hold_s, *args):
        """handlers: to be in while the connection lasts. large_bodies: a place is held while one is here.

        upstream, hold_s: as Relay takes them.
        """
        self._handlers, self._large_bodies = handlers, large_bodies
        self._hold_s, self._upstream = hold_s, Upstream(upstream, hold_s)
        super().__init__(*args)

    def setup(self):
        super().setup()
        self.has_asked = False
        self._rest()
        self._handlers.add(self)

    def finish(self):
        self._handlers.discard(self)
        self._upstream.close()
        super().finish()

    def hang_up(self):
        """Any thread may call it: what waits for the client fails."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def is_resting(self):
        """Whether no whole request is here and nothing of one has just come."""
        try:
            return not self._is_whole and not select.select([self.connection], [], [], 0)[0]
        except (OSError, ValueError):  # it has just been closed
            return False

    def _rest(self):
        self.since = time.monotonic()
        self.due = float("inf") if self.has_asked else self.since + FIRST_S
        self._is_whole = False

    def handle_one_request(self):
        super().handle_one_request()
        self._rest()

    def parse_request(self):
        self.due = min(self.due, time.monotonic() + _TRANSFER_S)
        return super().parse_request()

    def do_GET(self):
        self._pass_on()

    do_POST = do_GET

    def _pass_on(self):
        length = self.headers.get("Content-Length", "0")
        is_number = length.isascii() and length.isdigit() and len(length) < 10
        if not is_number or int(length) > MAX_BODY or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._refuse(413, f"the relay takes bodies with a Content-Length of at most {MAX_BODY}")
        elif int(length) <= LARGE_BODY:
            self._read_and_ask(int(length))
        elif self._large_bodies.acquire(blocking=False):
            try:
                self._read_and_ask(int(length))
            finally:
                self._large_bodies.release()
        else:
            self.close_connection = True
            self._refuse(503, f"{MAX_LARGE} bodies above {LARGE_BODY} bytes are here already; send a smaller picture")

    def _read_and_ask(self, length):
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            return
        is_path = self.path.isascii() and self.path.isprintable()
        if not is_path or not urlsplit(self.path).path.endswith(_HELD[self.command]):
            self._refuse(404, f"the relay passes on {self.command} {', '.join(_HELD[self.command])} only")
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_LINK}
        self._is_whole, self.has_asked, self.due = True, True, float("inf")
        try:
            status, kind, answer = self._upstream.ask(self.command, self.path, body, headers)
        except LinkDown:
            self._refuse(504, f"the policy server could not be reached through the tunnel for {self._hold_s:g} s")
        else:
            self._answer(status, kind, answer)

    def _refuse(self, status, reason):
        self._answer(status, "application/json", json.dumps({"error": reason}).encode() + b"\n")

    def _answer(self, status, kind, body):
        self.due = min(self.due, time.monotonic() + _TRANSFER_S)
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _tell(text):
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _port(text):
    if not text.isascii() or not text.isdigit() or not len(text) < 6 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, not {text[:20]!r}")
    return int(text)


def add_arguments(parser):
    """Those of `main`, also of the command `relay`."""
    parser.add_argument("url", metavar="URL", help="where the tunnel ends on this machine: http://127.0.0.1:8001")
    parser.add_argument("--port", type=_port, metavar="N", default=8000, help="for the station [8000]")
    parser.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on [127.0.0.1, this machine alone]"
    )


def run(args):
    """Relay until Ctrl-C; the exit status."""
    try:
        parts = urlsplit(args.url if "//" in args.url else f"http://{args.url}")
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"expected an address such as http://127.0.0.1:8001, not {args.url!r}")
        address = parts.hostname, parts.port or 80
        if address[1] == args.port and address[0] in (args.host, "127.0.0.1", "localhost"):
            raise ValueError(f"{args.url} is where the relay itself would listen; the tunnel ends at another port")
        relay = Relay(address, (args.host, args.port))
    except ValueError as error:
        sys.stderr.write(f"relay: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"relay: cannot listen on {args.host} port {args.port}: {error}; choose another --port\n")
        return 2
    with relay:
        print(f"ready: http://{args.host}:{relay.server_port} leads to http://{address[0]}:{address[1]}", flush=True)
        relay.serve_forever()


def main():
    parser = argparse.ArgumentParser(description="Hides from an AutoEval station that its tunnel drops.")
    add_arguments(parser)
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(run(parser.parse_args()))


if __name__ == "__main__":
    main()
