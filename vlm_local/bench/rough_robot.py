"""A robot that asks for actions as real ones do, and at times behaves as badly as their networks."""

import http.client
import json
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vlm_local.wire import encode_array

# Share of each deed in a robot's requests; the rest are well-formed ones whose answer is awaited.
DEEDS = {"malformed": 0.05, "hang up in the body": 0.02, "hang up before the answer": 0.02, "cross": 0.02}
STEPS_AN_EPISODE = 50
_PATIENCE_S = 60.0  # AutoEval itself waits for ever
MALFORMED = (
    b"",
    b"{",
    b"\xff\xfe",
    b'{"image": 1, "instruction": "go"}',
    b'{"image": [[[0]]], "instruction": "go"}',
    b'{"image": {"__numpy__": "AAAA", "dtype": "O", "shape": [1]}, "instruction": "go"}',
    b'{"instruction": "go", "proprio": [1, 2]}',
    b"[" * 100_000,
)


@dataclass
class Diary:
    """What one robot was told. answered: (episode, step) -> (action, stamp of the frame)."""

    counts: Counter = field(default_factory=Counter)
    refusals: Counter = field(default_factory=Counter)  # status -> well-formed requests refused with a reason
    latencies_ms: list[float] = field(default_factory=list)
    answered: dict[tuple[int, int], tuple[list[float], int]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


class RoughRobot(threading.Thread):
    """Runs until `stop` is set. One frame differs from every other in its stamp."""

    def __init__(
        self,
        url: str,
        name: str,
        hz: float,
        seed: int,
        stop: threading.Event,
        deeds: Mapping[str, float] = DEEDS,
    ):
        """deeds: share of each in the requests, one of DEEDS or "reconnect", a good one on a new connection."""
        super().__init__(name=name, daemon=True)
        parts = urlsplit(url)
        self.diary = Diary()
        self._address = (parts.hostname or "", parts.port or 80)
        self._path = f"/s/{name}"
        self._period_s = 1 / hz
        self._deeds = deeds
        self._random = np.random.default_rng(seed)
        self._picture = paint_picture(seed)
        self._stop_event = stop
        self._connection: http.client.HTTPConnection | None = None
        self._num_sent = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        next_reset = 0
        while not self._stop_event.is_set():
            start = perf_counter()
            if self._num_sent >= next_reset:
                self._reset()
                next_reset = self._num_sent + STEPS_AN_EPISODE
            self._do(self._choose_deed())
            self._stop_event.wait(max(0.0, self._period_s - (perf_counter() - start)))

    def _choose_deed(self) -> str:
        draw, total = self._random.random(), 0.0
        for deed, share in self._deeds.items():
            total += share
            if draw < total:
                return deed
        return "act"

    def _do(self, deed: str) -> None:
        self.diary.counts[deed] += 1
        if deed == "act":
            self._act()
        elif deed == "reconnect":
            self._act_apart()
        elif deed == "malformed":
            self._send_malformed()
        elif deed == "cross":
            others = [threading.Thread(target=self._act_apart) for _ in range(2)]
            for other in others:
                other.start()
            for other in others:
                other.join()
        else:
            self._hang_up(in_body=deed == "hang up in the body")

    def _build_body(self) -> tuple[bytes, int]:
        with self._lock:
            stamp = self._num_sent
            self._num_sent += 1
        image = self._picture.copy()
        image[0, :4, 0] = list(stamp.to_bytes(4, "little"))
        position = [0.25 + 0.02 * math.sin(stamp / 20), 0.02 * math.cos(stamp / 20), 0.15]
        proprio = np.array([*position, 0, 0, 0, 0, 0.39])
        fields = {"image": encode_array(image), "instruction": "put the carrot on the plate"}
        return json.dumps({**fields, "proprio": encode_array(proprio)}).encode(), stamp

    def _act(self) -> None:
        body, stamp = self._build_body()
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self._address, timeout=_PATIENCE_S)
        self._ask(self._connection, body, stamp)

    def _act_apart(self) -> None:
        """On a connection of its own."""
        body, stamp = self._build_body()
        connection = http.client.HTTPConnection(*self._address, timeout=_PATIENCE_S)
        self._ask(connection, body, stamp)
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, body: bytes, stamp: int) -> None:
        start = perf_counter()
        try:
            connection.request("POST", f"{self._path}/act?details=1", body)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except OSError as error:
            connection.close()
            return self._violate(f"a well-formed request got no answer: {error!r}")
        except http.client.HTTPException as error:
            connection.close()
            return self._violate(f"a well-formed request got no HTTP answer: {error!r}")
        ms = 1e3 * (perf_counter() - start)
        value = _read_json(text)
        with self._lock:
            if status == 200:
                self._take_answer(value, stamp, ms)
            elif status == 503 and isinstance(value, dict) and value.get("error"):
                self.diary.refusals[value["error"]] += 1
            else:
                self._violate(f"a well-formed request got {status}: {text[:200]!r}")

    def _take_answer(self, value: Any, stamp: int, ms: float) -> None:
        action = value.get("action") if isinstance(value, dict) else None
        if not isinstance(action, list) or len(action) != 7 or not np.isfinite(action).all():
            return self._violate(f"an answer without an action of 7 finite numbers: {str(value)[:200]}")
        key = (value["episode"], value["step"])
        if key in self.diary.answered:
            self._violate(f"episode {key[0]}, step {key[1]} was answered twice")
        self.diary.answered[key] = (action, stamp)
        if value["fault"]:
            self.diary.counts["held"] += 1
        else:
            self.diary.latencies_ms.append(ms)

    def _send_malformed(self) -> None:
        body = MALFORMED[self._random.integers(len(MALFORMED))]
        status, text = self._exchange("act", body)
        value = _read_json(text)
        is_refusal = status is not None and (400 <= status < 500 or status == 503)
        if not is_refusal or not isinstance(value, dict) or not value.get("error"):
            self._violate(f"a malformed request got {status}: {text[:200]!r}")

    def _reset(self) -> None:
        status, text = self._exchange("reset", b"")
        if status not in (200, 503):
            self._violate(f"a reset got {status}: {text[:200]!r}")

    def _exchange(self, route: str, body: bytes) -> tuple[int | None, bytes]:
        connection = http.client.HTTPConnection(*self._address, timeout=_PATIENCE_S)
        try:
            connection.request("POST", f"{self._path}/{route}", body)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            return None, repr(error).encode()
        finally:
            connection.close()

    def _hang_up(self, in_body: bool) -> None:
        body, _ = self._build_body()
        head = f"POST {self._path}/act HTTP/1.1\r\nHost: soak\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        try:
            with socket.create_connection(self._address, _PATIENCE_S) as connection:
                connection.sendall(head + (body[: len(body) // 2] if in_body else body))
                time.sleep(0.01)
        except OSError as error:
            self._violate(f"the server could not be reached: {error!r}")

    def _violate(self, what: str) -> None:
        self.diary.violations.append(f"{self.name}: {what}")


def paint_picture(seed: int) -> np.ndarray:
    """uint8 (256, 256, 3): smooth patterns with a little noise, which PNG packs about as a photo."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:256, 0:256] / 40.0
    waves = [np.sin(x * random.uniform(0.5, 2) + y * random.uniform(0.5, 2)) for _ in range(3)]
    return np.clip(128 + 90 * np.stack(waves, -1) + random.integers(-4, 5, (256, 256, 3)), 0, 255).astype(np.uint8)


def read_stamp(image: np.ndarray) -> int:
    return int.from_bytes(bytes(image[0, :4, 0].tolist()), "little")


def _read_json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
