"""Progress of work that takes longer than a few seconds, on stderr: what it is, how far, how fast, how long to go."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

_Item = TypeVar("_Item")

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Show no progress from now on, or show it again."""
    global _quiet
    _quiet = quiet


def is_shown() -> bool:
    """Whether there is a terminal for progress, and it may be shown."""
    return not _quiet and sys.stderr.isatty()


def open_bar(label: str, total: int | None = None, unit: str = "step", **settings: Any) -> Any:
    """A tqdm bar for a `with` statement, shown where stderr is a terminal.

    total: how many units, None where that is not known before.
    """
    from tqdm import tqdm

    return tqdm(desc=label, total=total, unit=unit, disable=True if _quiet else None, **settings)


def track(items: Iterable[_Item], label: str, unit: str = "step", total: int | None = None) -> Iterator[_Item]:
    """The same items, with a bar that goes on by one for each. total: where `items` has no length."""
    with open_bar(label, len(items) if isinstance(items, Sized) else total, unit) as bar:
        for item in items:
            yield item
            bar.update()
