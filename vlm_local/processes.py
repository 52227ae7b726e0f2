"""Processes that a command starts, and how all of them end: with Ctrl-C, with their parent, with an error."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker

from vlm_local.errors import VLMLocalError

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_M_ARENA_MAX, _NUM_ARENAS = -8, 2  # malloc.h

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that the block starts do not hear Ctrl-C: a terminal sends it to all, and it is for their parent.

    The parent hears it at the end of the block, so that no process is left half started.
    """
    resource_tracker.ensure_running()  # here, since it lets this thread hear SIGINT again after it has started
    with _postponed_interrupt(), deaf_children():
        yield


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that this thread starts in the block do not hear Ctrl-C, not even before their first line."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a child inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _postponed_interrupt() -> Iterator[None]:
    """SIGINT may also come by another thread, which does not block it; only the main thread is interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


class _Pool(ProcessPoolExecutor):
    def submit(self, *arguments, **named) -> Future:
        with shielded_children():  # it starts its processes as they are needed
            return super().submit(*arguments, **named)


@contextmanager
def open_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for the block, which end with it: at once, whatever they do, where it ends with an error or Ctrl-C.

    Raises VLMLocalError where one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    with _Pool(workers, context, initializer=_end_with_parent) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise VLMLocalError(
                "a process of this command was killed (out of memory?); the same command goes on"
            ) from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Also where the parent is killed."""
    threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # it runs in the pool's processes only
    parent.join()
    os._exit(1)


def die_with_parent(number: int) -> None:
    """Get signal `number` when the thread that started this process ends, also where it is killed."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def tie_to_parent(command: Sequence[str], number: int) -> list[str]:
    """The command such that it gets signal `number` when the thread that starts it ends.

    Python between the two asks for it. Popen's preexec_fn would do without, but it runs after a fork of all our memory
    and waits for ever for a lock that another thread held at that moment.
    """
    if _LIBC is None:
        return list(command)
    ask = f"import ctypes, os, sys; ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(number)}); "
    return [sys.executable, "-I", "-S", "-c", f"{ask}os.execvp(sys.argv[1], sys.argv[1:])", *command]


def end_process(process: subprocess.Popen, seconds: float = 10.0) -> None:
    """Let it end in order; kill it where that takes longer than this."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
