"""Who gets in: what an address means ([PREFIX] [/t/TOKEN] [/s/ROBOT] /route), token or network, rate, places, browsers.

A browser may do everything here for this server's own page, and nothing for pages of other sites. Robots are no
browsers and send no Origin header. A browser sends it with every POST and with every request to another site that it
lets a page read, and Sec-Fetch-Site to https and loopback addresses; no page can change either. What is left is a name
that a foreign site points at this machine (DNS rebinding): to the browser that site and this server are then one, so
without a token only names known to be ours count.
"""

import hmac
import ipaddress
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from vlm_local.errors import ConfigError, RequestError
from vlm_local.wire import MAX_BODY

DEFAULT_ROBOT = "robot"
# Keys of the WSGI environment: the request's connections.Channel, its Address, and its path as it came.
CONNECTION, ADDRESS, FULL_PATH = "vlm_local.connection", "vlm_local.address", "vlm_local.path"
CLIENT_HEADER = "Sec-Vlm-Local"  # of client.py; a page cannot send a header whose name begins with "Sec-"
MAX_SMALL_BODY = 2**16  # bytes, of requests without a picture

_ROBOT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TOKEN = re.compile(r"[A-Za-z0-9_.~-]{8,}")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
HeaderGetter = Callable[[str], str | None]


@dataclass(frozen=True)
class Address:
    """A request's path, taken apart.

    route: what is left, such as "/act". robot: as it stands in the path, None where none is named.
    """

    route: str
    robot: str | None = None
    token: str | None = None

    def check_robot(self) -> str:
        """The robot that is meant, DEFAULT_ROBOT where none is named.

        Raises RequestError (404) for a name that cannot be a robot's, which would become a folder of a recording.
        """
        if self.robot is None:
            return DEFAULT_ROBOT
        if not _ROBOT.fullmatch(self.robot) or self.robot in (".", ".."):
            raise RequestError("a robot's name is 1 to 64 letters, digits, '_', '.' or '-'", 404)
        return self.robot


def parse_address(path: str, prefix: str = "") -> Address:
    """Take a path apart. prefix: also understood without it, since some proxies strip it."""
    if path == prefix or path.startswith(prefix + "/"):
        path = path[len(prefix) :] or "/"
    token, path = _take(path, "/t/")
    robot, path = _take(path, "/s/")
    return Address(path, robot, token)


def longest_body(route: str) -> int:
    """The most bytes that the body of a request to `route` may have."""
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
    """Admits a request by its token or its client's address. With neither set, everyone who can connect is admitted."""

    def __init__(self, token: str | None = None, networks: Sequence[Network] = ()):
        if token is not None and not _TOKEN.fullmatch(token):
            raise ConfigError("a token is at least 8 letters, digits, '_', '.', '~' or '-', since it goes into URLs")
        self._token = token
        self._networks = tuple(networks)

    @property
    def is_open(self) -> bool:
        """Whether everyone is admitted."""
        return self._token is None and not self._networks

    def check(self, address: str, token: str | None) -> None:
        """Raises RequestError, 401 or 403. token: as `read_token` gives it."""
        if self.is_open or self._is_allowed(address):
            return
        if self._token is None:
            raise RequestError(f"requests from {address} are not allowed here; see --allow-from", 403)
        if token is None:
            raise RequestError("a token is needed: send it as a bearer header or as the path /t/TOKEN/act", 401)
        if not self.knows(token):
            raise RequestError("the token is wrong", 401)

    def knows(self, token: str | None) -> bool:
        """Whether this is the server's token."""
        if token is None or self._token is None:
            return False
        return hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode())

    def _is_allowed(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return any(ip in network for network in self._networks)


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
            self._buckets[address] = (left - 1.0 if left >= 1.0 else left, now)
        if left < 1.0:
            raise RequestError(f"more than {self._per_s:g} requests a second from {address}; slow down", 429)


@contextmanager
def take_place(places: threading.Semaphore, refusal: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold one of `places` during the block. Raises RequestError (503, `refusal`) where none is free within `wait_s`.

    Most do not wait at all, because a request that waits holds a thread that a robot may need.
    """
    if not places.acquire(timeout=wait_s):
        raise RequestError(refusal, 503)
    try:
        yield
    finally:
        places.release()


def check_origin(
    method: str, route: str, get_header: HeaderGetter, has_token: bool, names: Collection[str] = ()
) -> None:
    """Raises RequestError (403) for what a page of another site asks.

    get_header: name in any case -> value, None without one. has_token: it came with the server's token.
    names: of this server, beside localhost and IP addresses.
    """
    host, origin, site = (get_header(name) for name in ("Host", "Origin", "Sec-Fetch-Site"))
    if site not in (None, "same-origin", "none") and not _is_link(method, route, get_header):
        raise RequestError(f"a page of another site ({site}) may ask nothing of this server", 403)
    if origin is not None and site != "same-origin" and not _is_same(origin, host or ""):
        raise RequestError(f"a page of {origin[:100]!r} may ask nothing of this server, which is {host!r}", 403)
    may_be_page = origin is not None or site is not None or _is_plain_read(method, get_header)
    if may_be_page and host and not has_token and not is_known_host(host, {"localhost", *names}):
        raise RequestError(
            f"this server does not know itself as {host!r}, and a foreign site could call it so by DNS rebinding; "
            "use an IP address or localhost, serve with --host-name NAME, or with --token and ask below /t/TOKEN/",
            403,
        )


def is_known_host(host: str, names: Collection[str]) -> bool:
    """Whether a Host header can come from no DNS rebinding: an IP address, or a name we know to be ours."""
    name = host.rsplit(":", 1)[0] if re.search(r":\d*$", host) else host
    name = name.strip("[]").rstrip(".").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names or name.endswith(".localhost")
    return True


def _is_plain_read(method: str, get_header: HeaderGetter) -> bool:
    """Whether a browser may have sent it though it has neither header: one that reads, within one site, over http."""
    return method in ("GET", "HEAD", "OPTIONS") and get_header(CLIENT_HEADER) is None


def _is_link(method: str, route: str, get_header: HeaderGetter) -> bool:
    """Whether a person follows a link to the live page, which does nothing yet and cannot be framed."""
    goes = get_header("Sec-Fetch-Mode") == "navigate" and get_header("Sec-Fetch-Dest") == "document"
    return goes and method == "GET" and route == "/"


def _is_same(origin: str, host: str) -> bool:
    """Whether a page of this origin was fetched under this Host. The scheme is a proxy's affair."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default = {"http": ":80", "https": ":443"}.get(parts.scheme)
    netloc, host = (text.lower().removesuffix(default or "") for text in (parts.netloc, host))
    return default is not None and netloc == host
