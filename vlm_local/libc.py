"""What Linux and glibc do only when they are asked; elsewhere these functions do nothing."""

import ctypes
import sys

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_M_ARENA_MAX, _NUM_ARENAS = -8, 2  # malloc.h

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(number: int) -> None:
    """Get signal `number` when the thread that started this process ends, also where it is killed."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def share_heaps() -> None:
    """Let all threads share two of glibc's heaps. Before the first thread starts.

    With a heap for each thread, requests of 200 kB and more leave holes everywhere, and memory creeps up for hours.
    """
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _NUM_ARENAS)


def trim_heaps() -> None:
    """Give free pages back to the system, also those between blocks that are in use."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)
