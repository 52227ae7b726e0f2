"""What a browser may do here: this server's own page everything, pages of other sites nothing.

Robots are no browsers and say no Origin. A browser says it with every POST and with every request to
another site that it lets a page read, and Sec-Fetch-Site to https and loopback addresses; no page can
change either. What is left is a name that a foreign site points at this machine (DNS rebinding): to the
browser that site and this server are then one, so without a token only names known to be ours count.
"""

import ipaddress
import re
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from vlm_local.errors import RequestError

CLIENT_HEADER = "Sec-Vlm-Local"  # of client.py; a page cannot send a header whose name begins with "Sec-"


def check_origin(
    method: str, route: str, headers: Mapping[str, str], has_token: bool, names: Collection[str] = ()
) -> None:
    """Raises RequestError (403) for what a page of another site asks.

    headers: by name in any case. has_token: it came with the server's token. names: of this server, beside
    localhost and IP addresses.
    """
    host, origin, site = (headers.get(name) for name in ("Host", "Origin", "Sec-Fetch-Site"))
    if site not in (None, "same-origin", "none") and not _is_link(method, route, headers):
        raise RequestError(f"a page of another site ({site}) may ask nothing of this server", 403)
    if origin is not None and site != "same-origin" and not _is_same(origin, host or ""):
        raise RequestError(f"a page of {origin[:100]!r} may ask nothing of this server, which is {host!r}", 403)
    says_origin = origin is not None or site is not None
    may_be_page = says_origin or (method in ("GET", "HEAD", "OPTIONS") and CLIENT_HEADER not in headers)
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


def _is_link(method: str, route: str, headers: Mapping[str, str]) -> bool:
    """Whether a person follows a link to the live page, which does nothing yet and cannot be framed."""
    goes = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
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
