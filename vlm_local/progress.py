"""Progress of work that takes longer than a few seconds, on stderr: what it is, how far, how fast, how long to go."""

from contextlib import AbstractContextManager
from typing import Any

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Show no progress from now on, or show it again."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    return _quiet


def open_bar(label: str, total: int | None = None, unit: str = "step", **settings: Any) -> AbstractContextManager[Any]:
    """A tqdm bar, shown where stderr is a terminal. total: how many units, None where that is not known before."""
    from tqdm import tqdm

    return tqdm(desc=label, total=total, unit=unit, disable=True if _quiet else None, **settings)
