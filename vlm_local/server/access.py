"""Who gets in, and what an address means: [PREFIX] [/t/TOKEN] [/s/ROBOT] /route."""

import hmac
import ipaddress
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm_local.errors import ConfigError, RequestError
from vlm_local.wire import MAX_BODY

DEFAULT_ROBOT = "robot"
ADDRESS = "vlm_local.address"  # where the WSGI environment holds the request's Address
MAX_SMALL_BODY = 2**16  # bytes, of requests without a picture

_ROBOT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TOKEN = re.compile(r"[A-Za-z0-9_.~-]{8,}")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Address:
    """A request's path, taken apart. route: what is left, such as "/act". robot: None where none is named."""

    route: str
    robot: str | None = None
    token: str | None = None


def parse_address(path: str, prefix: str = "") -> Address:
    """Raises RequestError (404) for a robot's name that cannot be one.

    prefix: also understood without it, since some proxies strip it.
    """
    if prefix and (path == prefix or path.startswith(prefix + "/")):
        path = path[len(prefix) :] or "/"
    token, path = _take(path, "/t/")
    robot, path = _take(path, "/s/")
    if robot is None:
        return Address(path, token=token)
    if not _ROBOT.fullmatch(robot) or robot in (".", ".."):
        raise RequestError("a robot's name is 1 to 64 letters, digits, '_', '.' or '-'", 404)
    return Address(path, robot, token)


def longest_body(route: str) -> int:
    """Bytes that a request's body may have."""
    return MAX_BODY if route in ("/act", "/answer", "/live/try") else MAX_SMALL_BODY


def _take(path: str, mark: str) -> tuple[str | None, str]:
    """ "/t/abc/act", "/t/" -> "abc", "/act"."""
    if not path.startswith(mark):
        return None, path
    word, _, rest = path[len(mark) :].partition("/")
    return word, f"/{rest}"


def parse_networks(text: str) -> tuple[Network, ...]:
    """ "10.0.0.0/8,192.168.1.7" -> networks."""
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            f"allow-from {text!r}: expected addresses such as 10.1.0.0/16,192.168.1.7 ({error})"
        ) from None


def read_token(token: str | None, authorization: str) -> str | None:
    """The token of a request. token: of its path. authorization: the header, which counts first; "" for none."""
    scheme, _, bearer = authorization.partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else token


class Gate:
    """Admits by token or by address. With neither set everyone who can connect is in."""

    def __init__(self, token: str | None = None, networks: Sequence[Network] = ()):
        if token is not None and not _TOKEN.fullmatch(token):
            raise ConfigError("a token is at least 8 letters, digits, '_', '.', '~' or '-', since it goes into URLs")
        self._token = token
        self._networks = tuple(networks)

    @property
    def is_open(self) -> bool:
        return self._token is None and not self._networks

    def check(self, address: str, token: str | None, authorization: str) -> None:
        """Raises RequestError, 401 or 403. authorization: the header's value, "" for none."""
        if self.is_open or self._is_near(address):
            return
        if self._token is None:
            raise RequestError(f"requests from {address} are not allowed here; see --allow-from", 403)
        given = read_token(token, authorization)
        if given is None:
            raise RequestError("a token is needed: send it as a bearer header or as the path /t/TOKEN/act", 401)
        if not self.knows(given):
            raise RequestError("the token is wrong", 401)

    def knows(self, token: str | None) -> bool:
        """Whether this is the server's token."""
        if token is None or self._token is None:
            return False
        return hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode())

    def _is_near(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return any(ip.version == network.version and ip in network for network in self._networks)


class RateLimit:
    """A token bucket per address: `per_s` requests a second, bursts of as many."""

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic):
        self._per_s = per_s
        self._size = max(per_s, 1.0)
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # address -> (what is left, when)
        self._lock = threading.Lock()

    def check(self, address: str) -> None:
        """Raises RequestError (429) for one too many."""
        with self._lock:
            now = self._clock()
            left, then = self._buckets.get(address, (self._size, now))
            left = min(self._size, left + (now - then) * self._per_s)
            if len(self._buckets) > 10_000:
                self._buckets.clear()
            self._buckets[address] = (max(left - 1.0, 0.0) if left >= 1.0 else left, now)
        if left < 1.0:
            raise RequestError(f"more than {self._per_s:g} requests a second from {address}; slow down", 429)
