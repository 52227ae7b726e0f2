"""Thoughts at a server behind an API: written field by field while no step is under way. asyncio only.

A server cannot be told to stop and go on, so a field is the piece: its question is dropped where a step comes, its
connection closed, and asked again when the step has its answer. Fields that are written stay.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

from vlm_local.engines.chat_api import Completion
from vlm_local.plain import make_line
from vlm_local.types import Thought, ThoughtRequest

Answer = TypeVar("Answer")


class StepGaps:
    """The times in which no robot's request is under way. Its coroutines belong to one event loop."""

    def __init__(self):
        self._num_steps = 0
        self._open = asyncio.Event()
        self._open.set()
        self._running: set[asyncio.Task] = set()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """A step is asked during the block: whatever runs in the gap is dropped at once."""
        self._num_steps += 1
        self._open.clear()
        for task in self._running:
            task.cancel()
        try:
            yield
        finally:
            self._num_steps -= 1
            if not self._num_steps:
                self._open.set()

    async def run(self, job: Callable[[], Coroutine[Any, Any, Answer]], is_awaited: bool = False) -> Answer:
        """Do it in a gap, from its beginning in another one where it was dropped. is_awaited: at once, steps or not."""
        while True:
            if not is_awaited:
                await self._open.wait()
            task = asyncio.ensure_future(job())
            if not is_awaited:
                self._running.add(task)
            try:
                await asyncio.wait({task})
            finally:
                self._running.discard(task)
                task.cancel()  # where this one was cancelled
            if not task.cancelled():
                return task.result()


async def write_thought(
    request: ThoughtRequest,
    ask: Callable[[str, int], Awaitable[Completion]],
    make_plain: Callable[[str], str],
) -> Thought:
    """ask: words behind the question, most tokens -> what the server wrote. make_plain: of its control tokens.

    Raises what `ask` raises, and RequestError for words that stand for a picture.
    """
    lines: list[str] = []
    num_spent, ms = 0, 0.0
    for name, limit in request.fields:
        limit = min(limit, request.max_tokens - num_spent)
        if limit <= 0:
            break
        start = perf_counter()
        completion = await ask("\n".join([*lines, f"Write the next line only, after these words: {name}:"]), limit)
        ms += 1e3 * (perf_counter() - start)
        words = _read_line(completion.text, name)[:limit]  # a server may know no limit; a word is a token or more
        num_spent += completion.num_tokens or len(words)
        if text := make_plain(make_line(" ".join(words))):
            lines.append(f"{name}: {text}")
    return Thought("\n".join(lines), num_spent, round(ms, 1))


def _read_line(text: str, name: str) -> list[str]:
    """Words of the first line that has any, without the field's name."""
    line = next((each.strip() for each in text.splitlines() if each.strip()), "")
    if line.lower().startswith(f"{name.lower()}:"):
        line = line[len(name) + 1 :]
    return line.split()
