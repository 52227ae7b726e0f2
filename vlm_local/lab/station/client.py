"""AutoEval's `OpenWebClient` in bytes: one connection for the whole job, no time-out, no name, no retry."""

import http.client
import json
import logging
import selectors
import socket
from urllib.parse import quote, urlsplit

import numpy as np

from vlm_local.client import PolicyError, parse_action
from vlm_local.errors import ConfigError
from vlm_local.wire import encode_array

logger = logging.getLogger(__name__)

TEST_INSTRUCTION = "test connection"
_TEST_S = 8.0
_SLOW_S = 60.0
_MAX_ANSWER = 2**22  # bytes
_SHOWN = 120  # characters of an answer that is not as it should be


class JobEnded(Exception):
    """What AutoEval would not have survived: the message is the exception that it raises."""


class StationClient:
    """One client of the station. Not thread-safe."""

    def __init__(self, url: str, timeout_s: float | None = None):
        """timeout_s: for each wait for bytes; None waits for ever, as AutoEval does. Raises ConfigError."""
        self.address, path = split_url(url)
        self._path = quote(path, safe="/%")
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def act(self, image: np.ndarray, instruction: str, state: np.ndarray) -> np.ndarray:
        """float64 (7,). Raises JobEnded."""
        fields = {"image": encode_array(image), "instruction": instruction, "proprio": encode_array(state)}
        status, body = self._post("/act", json.dumps(fields).encode())
        if status != 200:
            raise JobEnded(f"RuntimeError: /act answered {status}: {_show(body)}")
        try:
            return parse_action(body)
        except PolicyError as error:
            raise JobEnded(f"RuntimeError: {error}") from None

    def reset(self) -> None:
        """Raises JobEnded."""
        status, body = self._post("/reset", b"")
        if status not in (200, 404):
            raise JobEnded(f"RuntimeError: /reset answered {status}: {_show(body)}")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self.address, timeout=self._timeout_s)
        try:
            self._connection.request("POST", self._path + path, body, {"Content-Type": "application/json"})
            if self._timeout_s is None:
                _tell_slow(self._connection.sock, path)
            response = self._connection.getresponse()
            data = response.read(_MAX_ANSWER + 1)
            if len(data) > _MAX_ANSWER:
                raise http.client.HTTPException(f"the answer has more than {_MAX_ANSWER} bytes")
            if response.length:  # the answer ended before its announced length
                raise http.client.IncompleteRead(data, response.length)
            return response.status, data
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last for names that no host has
            self.close()
            reason = str(error) or type(error).__name__
            raise JobEnded(f"requests.exceptions.ConnectionError: {path}: {reason}") from None


def _tell_slow(connection: socket.socket, path: str) -> None:
    """Say so where an answer takes long: there is no time-out, so a server that hangs keeps the job for ever."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        if not selector.select(_SLOW_S):
            text = "%s has not been answered for %g s; AutoEval waits without end, and so does this (Ctrl-C stops it)"
            logger.warning(text, path, _SLOW_S)


def split_url(url: str) -> tuple[tuple[str, int], str]:
    """(host, port) and path. Raises ConfigError for what is no address of a policy server."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return (parts.hostname, parts.port or 80), parts.path.rstrip("/")
    except ValueError:  # a port that is none, a bracket that is not closed
        pass
    raise ConfigError(f"a station speaks plain HTTP, to an address such as http://127.0.0.1:8000, not {url!r}")


def _show(body: bytes) -> str:
    """The beginning of an answer, in one line."""
    text = " ".join(body[: 4 * _SHOWN].decode("utf-8", "replace").split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def submit_test(url: str) -> None:
    """The form's test, on a connection of its own. Raises JobEnded where the form would refuse the address."""
    client = StationClient(url, _TEST_S)
    try:
        client.act(np.zeros((256, 256, 3), np.uint8), TEST_INSTRUCTION, np.zeros(8, np.float32))
    finally:
        client.close()
