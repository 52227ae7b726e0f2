"""Examines any policy server of AutoEval's protocol: each client's own bytes, then speed and sight.

The server's unnamed robot is reset and driven, so no arm should hang on it meanwhile.
"""

import base64
import functools
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from time import perf_counter
from urllib.parse import urlsplit

import numpy as np

from vlm_local.client import PolicyClient, PolicyError, parse_action
from vlm_local.data.images import encode_file
from vlm_local.machine import Finding
from vlm_local.wire import encode_array

AUTOEVAL_TIMEOUT_S = 8.0
CONTROL_PERIOD_MS = 200.0  # 5 Hz
MAX_STEP_M, MAX_STEP_RAD = 0.05, 0.25  # what inspect-robots' WidowX takes in one step
NUM_TIMED = 50
_TIMING_BUDGET_S = 60.0
_INSTRUCTION = "put the eggplant in the blue sink"


@dataclass(frozen=True)
class Case:
    """One client's request. forms: what it can read, of "list", "array" (json_numpy) and "string"."""

    name: str
    body: bytes
    headers: tuple[tuple[str, str], ...]
    forms: tuple[str, ...]
    timeout_s: float = 30.0
    num_steps: int = 1


class _Failed(Exception):
    """Why a check failed, as a sentence."""


def examine(url: str) -> Iterator[Finding]:
    """Findings as they are made. Raises ValueError at once for what is no URL."""
    return _examine(_Patient(url))


def _examine(patient: "_Patient") -> Iterator[Finding]:
    if urlsplit(patient.url).path:
        yield Finding("warn", "address", "AutoEval's form takes a host and a port only; this address has a path")
    alive = _guarded("health", patient.check_health)
    yield alive
    if alive.verdict == "FAIL":
        return
    yield _guarded("reset", patient.check_reset)
    cases = build_cases()
    yield _guarded("first request", lambda: patient.check_case(cases[0], reset=False))
    for case in cases:
        yield _guarded(case.name, lambda case=case: patient.check_case(case))
    yield _guarded("broken request", patient.check_broken_request)
    yield _guarded("two clients at once", patient.check_two_clients)
    yield _guarded("latency", patient.check_latency)
    yield _guarded("depends on the image", patient.check_sight)


def _guarded(name: str, check: Callable[[], str | Finding]) -> Finding:
    try:
        found = check()
    except (_Failed, PolicyError) as error:
        return Finding("FAIL", name, str(error))
    except (OSError, http.client.HTTPException) as error:
        return Finding("FAIL", name, f"no answer: {str(error) or type(error).__name__}")
    return found if isinstance(found, Finding) else Finding("ok", name, found)


_REQUESTS = (
    ("User-Agent", "python-requests/2.32.3"),
    ("Accept-Encoding", "gzip, deflate"),
    ("Accept", "*/*"),
    ("Connection", "keep-alive"),
)
_JSON = ("Content-Type", "application/json")


@functools.cache
def build_cases() -> tuple[Case, ...]:
    """The clients of the protocol, in the bytes they send."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (256, 256, 3), np.uint8)
    proprio = np.array([0.3, 0.0, 0.15, 0.0, 0.1, 0.0, 0.0, 0.38])
    arrays = ("list", "array")

    def pack(image, instruction=_INSTRUCTION, **more) -> bytes:
        fields = {"image": encode_array(image) if isinstance(image, np.ndarray) else image}
        more = {name: encode_array(v) if isinstance(v, np.ndarray) else v for name, v in more.items()}
        return json.dumps({**fields, "instruction": instruction, **more}).encode()

    rollout = pack(image, proprio=proprio)
    submission = pack(np.zeros_like(image), "test connection", proprio=np.zeros(8))
    openvla = {"unnorm_key": "bridge_orig"}
    seven = np.append(proprio[:6], 1.0)
    png, jpeg = (base64.b64encode(encode_file(image, kind)).decode() for kind in ("PNG", "JPEG"))
    json_numpy = (*_REQUESTS, _JSON)
    return (
        Case("autoeval submission test", submission, json_numpy, arrays, AUTOEVAL_TIMEOUT_S),
        Case("autoeval rollout", rollout, json_numpy, arrays, num_steps=3),
        Case("simplerenv, openvla", pack(image, **openvla), json_numpy, arrays),
        Case("openvla with proprio", pack(image, **openvla, proprio=seven), json_numpy, arrays),
        Case("double-encoded", json.dumps({"encoded": rollout.decode()}).encode(), json_numpy, ("string",)),
        Case("inspect-robots widowx", pack(image, **openvla), (), (*arrays, "string")),
        Case("plain, nested list", pack(image.tolist()), (_JSON,), ("list",)),
        Case("plain, base64 png", pack(png), (_JSON,), ("list",)),
        Case("plain, base64 jpeg", pack(jpeg), (_JSON,), ("list",)),
        Case("plain, data url", pack(f"data:image/png;base64,{png}"), (_JSON,), ("list",)),
    )


def judge_action(body: bytes, forms: tuple[str, ...]) -> str:
    """The form a client finds, with its size checked. Raises _Failed for one it cannot read."""
    action = parse_action(body)
    value = json.loads(body)
    form = {list: "list", dict: "array", str: "string"}[type(value)]
    if form not in forms:
        raise _Failed(f"it reads a JSON {' or '.join(forms)}, but got: {body[:80]!r}")
    if np.abs(action[:3]).max() > MAX_STEP_M or np.abs(action[3:6]).max() > MAX_STEP_RAD:
        raise _Failed(f"more than {MAX_STEP_M} m or {MAX_STEP_RAD} rad in one step: {action.tolist()}")
    return f"{form} of 7"


class _Patient:
    """The server examined."""

    def __init__(self, url: str):
        self._client = PolicyClient(url)
        self.url = (url if "//" in url else f"http://{url}").rstrip("/")

    def _send(self, connection, path: str, body: bytes, headers=()) -> tuple[int, bytes, float]:
        """Exactly these headers (and Host and Content-Length) -> status, body, milliseconds."""
        start = perf_counter()
        connection.putrequest("POST", urlsplit(self.url).path + path, skip_accept_encoding=True)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        data = response.read()
        return response.status, data, 1e3 * (perf_counter() - start)

    @contextmanager
    def _connect(self, timeout_s: float):
        parts = urlsplit(self.url)
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with closing(make(parts.hostname or "", parts.port, timeout=timeout_s)) as connection:
            yield connection

    def check_health(self) -> str | Finding:
        try:
            state = json.loads(self._client.request("GET", "/health")).get("status")
        except PolicyError as error:
            if error.status is None or error.status == 503:
                raise
            return Finding("ok", "health", f"no /health ({error.status}); no client needs it")
        except (ValueError, AttributeError):
            state = "something, but no JSON object"
        metadata = self._client.metadata
        if not self._client.is_vlm_local:
            return f"{state}; not a vlm-local server"
        if metadata.get("trained") is False:
            return Finding("warn", "health", f"{state}, but the weights of {metadata.get('model')} are untrained")
        return f"{state}, serves {metadata.get('model')}"

    def check_reset(self) -> str:
        with self._connect(AUTOEVAL_TIMEOUT_S) as connection:
            return self._reset(connection)

    def _reset(self, connection) -> str:
        """On the connection of the steps that follow, as clients do: another one would be another robot."""
        status, body, ms = self._send(connection, "/reset", b"", _REQUESTS)
        if status not in (200, 404):
            raise _Failed(f"an empty POST /reset got {status}: {body[:120]!r}; AutoEval ends the job on that")
        return f"{status}, {ms:.0f} ms"

    def check_case(self, case: Case, reset: bool = True) -> str:
        found, slowest = "", 0.0
        with self._connect(case.timeout_s) as connection:
            if reset:
                self._reset(connection)
            for _ in range(case.num_steps):
                status, body, ms = self._send(connection, "/act", case.body, case.headers)
                if status != 200:
                    raise _Failed(f"got {status}: {body[:160].decode('utf-8', 'replace')}")
                found = judge_action(body, case.forms)
                slowest = max(slowest, ms)
        return f"{found}, {slowest:.0f} ms" + (f", {case.num_steps} steps kept alive" if case.num_steps > 1 else "")

    def check_broken_request(self) -> str | Finding:
        with self._connect(30) as connection:
            status, _, _ = self._send(connection, "/act", b'{"image": [', (_JSON,))
        self.check_case(build_cases()[1])
        if 400 <= status < 500:
            return f"refused with {status}, and the next one is answered"
        return Finding("warn", "broken request", f"got {status} instead of a 4xx, but the next one is answered")

    def check_two_clients(self) -> str:
        case = build_cases()[1]
        outcomes: list[str] = []

        def drive():
            try:
                self.check_case(case, reset=False)
            except (_Failed, PolicyError, OSError, http.client.HTTPException) as error:
                outcomes.append(str(error) or type(error).__name__)

        self.check_reset()
        threads = [threading.Thread(target=drive) for _ in range(2)]
        start = perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if outcomes:
            raise _Failed(outcomes[0])
        return f"{2 * case.num_steps} answers in {1e3 * (perf_counter() - start):.0f} ms"

    def check_latency(self) -> str | Finding:
        case = build_cases()[1]
        times: list[float] = []
        end = perf_counter() + _TIMING_BUDGET_S
        with self._connect(30) as connection:
            self._reset(connection)
            while len(times) < NUM_TIMED and (perf_counter() < end or len(times) < 2):
                status, body, ms = self._send(connection, "/act", case.body, case.headers)
                if status != 200:
                    raise _Failed(f"request {len(times) + 1} got {status}: {body[:120]!r}")
                times.append(ms)
        median, p95, most = np.percentile(times, [50, 95, 100])
        text = f"median {median:.0f} ms, p95 {p95:.0f} ms, most {most:.0f} ms of {len(times)} requests"
        if most > 1e3 * AUTOEVAL_TIMEOUT_S:
            raise _Failed(f"{text}; AutoEval's test waits {AUTOEVAL_TIMEOUT_S:g} s")
        if p95 > CONTROL_PERIOD_MS:
            return Finding("warn", "latency", f"{text}; 5 Hz control leaves {CONTROL_PERIOD_MS:.0f} ms")
        return f"{text}; within the {CONTROL_PERIOD_MS:.0f} ms of 5 Hz"

    def check_sight(self) -> str | Finding:
        """The same image twice, before anything is said of another one."""
        name = "depends on the image"
        first, *others = (self._see(image) for image in _build_sights())
        own = np.abs(first - self._see(next(_build_sights()))).max()
        change = max(np.abs(first - other).max() for other in others)
        noun, what = ("probabilities", "probabilities move") if len(first) > 7 else ("the action", "action moves")
        if change > 10 * own:
            return f"yes: the {what} by up to {change:.3g} over {len(others)} other images"
        if own == 0:
            return Finding("warn", name, f"no: {len(others)} other images changed nothing in {noun}")
        text = f"unknown: the {what} by {change:.3g} with the image, and by {own:.3g} with the same one"
        return Finding("warn", name, text)

    def _see(self, image: np.ndarray) -> np.ndarray:
        """The marginals (18,) where the server tells them, else the action (7,), of an episode's first step."""
        self._client.reset(seed=0)
        answer = self._client.act(image, _INSTRUCTION, None)
        marginals = answer.get("marginals")
        return answer["action"] if marginals is None else np.array(list(dict(marginals).values()), np.float64).ravel()


def _build_sights() -> Iterator[np.ndarray]:
    """Images that have nothing in common, uint8 (256, 256, 3)."""
    rng = np.random.default_rng(1)
    yield rng.integers(0, 256, (256, 256, 3), np.uint8)
    yield np.zeros((256, 256, 3), np.uint8)
    yield np.full((256, 256, 3), 255, np.uint8)
    gradient = np.linspace(0, 255, 256).astype(np.uint8)
    yield np.stack(np.broadcast_arrays(gradient[None], gradient[:, None], gradient[::-1, None]), axis=2)
    yield rng.integers(0, 256, (256, 256, 3), np.uint8)
