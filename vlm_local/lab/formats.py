"""Numbers as text, in one form for pages, terminal tables and the leaderboard. None is `missing`."""

import re
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

Interval = Sequence[float] | None


def format_share(share: float | None, missing: str = "-", decimals: int = 1) -> str:
    """0.1234 -> "12.3 %"."""
    return missing if share is None else f"{format_points(share, decimals)} %"


def format_points(share: float, decimals: int = 0, sign: str = "") -> str:
    """A share, or a difference of shares, in percentage points: 0.1234 -> "12". sign: "+" also writes plus signs."""
    return f"{round(100 * share, decimals) + 0.0:{sign}.{decimals}f}"  # adding 0.0 turns -0.0 into 0.0


def format_span(interval: Interval, decimals: int = 0, sign: str = "") -> str:
    """An interval of shares in percentage points, e.g. "36 to 51"; "" for None or edges that read the same."""
    return format_edges(interval, lambda edge: format_points(edge, decimals, sign))


def format_fixed(value: float | None, decimals: int = 2, sign: str = "") -> str:
    """0.1234 -> "0.12"; None -> "-". sign: "+" also writes plus signs."""
    return "-" if value is None else f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"


def format_range(interval: Interval, decimals: int = 2, sign: str = "") -> str:
    """An interval of plain numbers, e.g. "0.12 to 0.34"; "" for None or edges that read the same."""
    return format_edges(interval, lambda edge: format_fixed(edge, decimals, sign))


def format_edges(interval: Interval, write: Callable[[float], str]) -> str:
    """ "" for edges that read the same: units that agree say nothing of others, and "0 to 0" says nothing at all."""
    low, high = ("", "") if interval is None else map(write, interval)
    return "" if low == high else f"{low} to {high}"


def format_number(value: float | None, missing: str = "-") -> str:
    """Three significant digits, for errors of any size."""
    return missing if value is None else f"{value:.3g}"


def format_name(name: str) -> str:
    """A policy or data set in a title: the last part of a path, a URL's host and port, any other name as it is.

    A version that TFDS puts below a data set's folder keeps that name: "data/bridge/1.0.0" -> "bridge/1.0.0".
    """
    parts = urlsplit(name)
    if parts.scheme in ("http", "https") and parts.netloc:
        return parts.netloc
    folders = name.rstrip("/").split("/")
    return "/".join(folders[-2:] if re.fullmatch(r"\d[\d.]*", folders[-1]) else folders[-1:]) or name


def format_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
