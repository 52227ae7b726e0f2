"""Everybody but the robots: slow sockets, rubbish, large bodies, questions, tries, pages, all at once.

Run as `python -m vlm_local.bench.strangers URL SECONDS`, a process of its own, so that it takes no interpreter's
lock from the robots whose time is measured. Prints "ready" and, in the end, what came back as a JSON object.
"""

import base64
import http.client
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from urllib.parse import urlsplit

import numpy as np

from vlm_local.bench.rough_robot import MALFORMED, paint_picture
from vlm_local.data.images import encode_file
from vlm_local.wire import encode_array

SLOW_HEADERS, SLOW_BODIES = 100, 20  # connections
VIEWERS = 2
_PATIENCE_S = 60.0
_JSON = {"Content-Type": "application/json"}

Request = tuple[str, str, bytes]  # method, path, body


class Strangers:
    """Threads that ask until the time is over. counts: "what: status" -> number of answers."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.counts: Counter[str] = Counter()
        self._address = (parts.hostname or "", parts.port or 80)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        jobs: list[tuple[Callable, tuple]] = [(self._ask, (name, *what)) for name, what in _list_requests().items()]
        jobs += [(self._drip, ("slow headers", b"POST /act HTTP/1.1\r\nX: ", SLOW_HEADERS))]
        body = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n"
        jobs += [(self._drip, ("slow bodies", body, SLOW_BODIES)), *[(self._view, ())] * VIEWERS]
        self._threads = [threading.Thread(target=job, args=args, daemon=True) for job, args in jobs]

    def run(self, seconds: float) -> None:
        for thread in self._threads:
            thread.start()
        time.sleep(seconds)
        self._stop.set()
        for thread in self._threads:
            thread.join(_PATIENCE_S)

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _ask(self, name: str, requests: list[Request], hz: float) -> None:
        for method, path, body in cycle(requests):
            connection = http.client.HTTPConnection(*self._address, timeout=_PATIENCE_S)
            try:
                connection.request(method, path, body, _JSON)
                response = connection.getresponse()
                response.read()
                self._count(f"{name}: {response.status}")
            except (OSError, http.client.HTTPException) as error:
                self._count(f"{name}: {type(error).__name__}")
            finally:
                connection.close()
            if self._stop.wait(1 / hz):
                return

    def _drip(self, name: str, head: bytes, count: int) -> None:
        """Keep so many connections open, each with a byte a second; what is closed is opened again."""
        connections: list[socket.socket] = []
        while not self._stop.wait(1.0):
            for connection in list(connections):
                try:
                    connection.sendall(b"x")
                except OSError:
                    connections.remove(connection)
                    connection.close()
                    self._count(f"{name}: closed")
            with suppress(OSError):
                while len(connections) < count:
                    connections.append(socket.create_connection(self._address, 5))
                    connections[-1].sendall(head)
        for connection in connections:
            connection.close()

    def _view(self) -> None:
        with suppress(OSError), socket.create_connection(self._address, _PATIENCE_S) as connection:
            connection.sendall(b"GET /live/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not self._stop.is_set() and connection.recv(65536):
                pass


def _list_requests() -> dict[str, tuple[list[Request], float]]:
    """What is asked -> its requests, in turn, and how many a second."""
    image = paint_picture(7)
    url = "data:image/png;base64," + base64.b64encode(encode_file(image, "PNG")).decode()
    tried = json.dumps({"image": url, "instruction": "lift the cup"}).encode()
    asked = {"image": encode_array(image), "question": "is the drawer open?"}
    many = ["".join(chr(0x1F300 + 7 * first + second) for second in range(60)) for first in range(64)]
    large = encode_array(np.zeros((2000, 2000, 3), np.uint8))
    bodies = [
        b'{"instruction":"go","image":[' + b"[]," * 20_000_000 + b"1]}",
        json.dumps({"image": large, "instruction": "go"}).encode(),
        b"x" * 70_000_000,
    ]
    paths = ("/", "/static/live.js", "/live/frame/robot-0", "/live/episodes", "/metrics", "/metadata", "/health")
    return {
        "rubbish": ([("POST", "/s/stranger/act", body) for body in (*MALFORMED, b"\0" * 1000)], 10.0),
        "made-up names": ([("POST", f"/s/made-up-{number}/reset", b"") for number in range(1000)], 2.0),
        "large bodies": ([("POST", "/s/stranger/act", body) for body in bodies], 0.5),
        "questions": ([("POST", "/answer", json.dumps({**asked, "choices": ["yes", "no"]}).encode())], 0.5),
        "long questions": ([("POST", "/answer", json.dumps({**asked, "choices": many}).encode())], 0.5),
        "tries": ([("POST", "/live/try", tried)], 0.5),
        "pages": ([("GET", path, b"") for path in paths], 5.0),
    }


def main() -> None:
    strangers = Strangers(sys.argv[1])
    print("ready", flush=True)
    strangers.run(float(sys.argv[2]))
    print(json.dumps(strangers.counts), flush=True)


if __name__ == "__main__":
    main()
