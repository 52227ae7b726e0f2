"""AutoEval's `OpenWebClient` in bytes: one connection for the whole job, no time-out, no name, no retry."""

import http.client
import json
from urllib.parse import urlsplit

import numpy as np

from vlm_local.client import PolicyError, parse_action
from vlm_local.errors import ConfigError
from vlm_local.wire import encode_array

TEST_INSTRUCTION = "test connection"
_TEST_S = 8.0


class JobEnded(Exception):
    """What AutoEval would not have survived: the message is the exception that it raises."""


class StationClient:
    """One client of the station. Not thread-safe."""

    def __init__(self, url: str, timeout_s: float | None = None):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"a station speaks plain HTTP, to an address such as http://127.0.0.1:8000, not {url!r}")
        self._address = parts.hostname, parts.port or 80
        self._path = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def act(self, image: np.ndarray, instruction: str, state: np.ndarray) -> np.ndarray:
        """float64 (7,). Raises JobEnded."""
        fields = {"image": encode_array(image), "instruction": instruction, "proprio": encode_array(state)}
        status, body = self._post("/act", json.dumps(fields).encode())
        if status != 200:
            raise JobEnded(f"RuntimeError: /act answered {status}: {body[:200].decode('utf-8', 'replace')}")
        try:
            return parse_action(body)
        except PolicyError as error:
            raise JobEnded(f"RuntimeError: {error}") from None

    def reset(self) -> None:
        """Raises JobEnded."""
        status, body = self._post("/reset", b"")
        if status not in (200, 404):
            raise JobEnded(f"RuntimeError: /reset answered {status}: {body[:200].decode('utf-8', 'replace')}")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self._address, timeout=self._timeout_s)
        try:
            self._connection.request("POST", self._path + path, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            reason = str(error) or type(error).__name__
            raise JobEnded(f"requests.exceptions.ConnectionError: {path}: {reason}") from None


def submit_test(url: str) -> None:
    """The form's test, on a connection of its own. Raises JobEnded where the form would refuse the address."""
    client = StationClient(url, _TEST_S)
    try:
        client.act(np.zeros((256, 256, 3), np.uint8), TEST_INSTRUCTION, np.zeros(8, np.float32))
    finally:
        client.close()
