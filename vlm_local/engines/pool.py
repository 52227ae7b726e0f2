"""Several servers of one model: which robot asks which, and what happens when one fails. asyncio only."""

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from vlm_local.engines.remote import Server
from vlm_local.errors import REMOTE_KINDS, RemoteError, VLMLocalError

Answer = TypeVar("Answer")
Job = Callable[[Server], Coroutine[Any, Any, Answer]]

_REVIVE_S = 1.0  # between two looks at the servers that failed


class ServerPool:
    """Robots are dealt out evenly and stay with their server, whose prefix cache knows their prompt.

    While it is down they ask the next one, and they come back. The last server that is up stays so
    whatever it does: every answer is checked anyway, and it may be the one that recovers. A server
    that dropped a connection may have been started anew, so it is made ready again in any case.
    """

    def __init__(self, servers: Sequence[Server], connect: Callable[[Server], Coroutine[Any, Any, None]]):
        """connect: makes a server ready, the first time and after each failure; raises where it cannot."""
        self.servers = tuple(servers)
        self.down: set[Server] = set()
        # All there from the start: other threads read them while this one counts.
        self.counters: Counter[str] = Counter(dict.fromkeys(("requests", "retries", "revived", *REMOTE_KINDS), 0))
        self._connect = connect
        self._returning: set[Server] = set()
        self._unreachable: set[Server] = set()  # those of them that could not be connected again so far
        self._homes: dict[str, int] = {}
        self._revivals: set[asyncio.Task] = set()

    @property
    def up(self) -> list[Server]:
        return [server for server in self.servers if server not in self.down]

    @property
    def is_down(self) -> bool:
        """Whether no server can be connected."""
        return len(self._unreachable) == len(self.servers)

    async def open(self) -> None:
        """Connect to all. Raises what a server that cannot be used raised, or when none can be reached."""
        outcomes = await asyncio.gather(*map(self._connect, self.servers), return_exceptions=True)
        failures = [outcome for outcome in outcomes if outcome is not None]
        unusable = [failure for failure in failures if not isinstance(failure, RemoteError)]
        if unusable or len(failures) == len(self.servers):
            raise (unusable or failures)[0]
        for server, outcome in zip(self.servers, outcomes, strict=True):
            if outcome is not None:
                self._leave(server)

    async def run(
        self, robot: str | None, job: Job[Answer], deadline_s: float, plainer: Job[Answer] | None = None
    ) -> Answer:
        """One answer from one server: at most one retry, nothing after `deadline_s`.

        A job that is too late is cancelled, its connection closed and its answer never read.
        robot: who asks, None for a question that is no robot's. plainer: the job without what a server
        may refuse, None where there is none.
        """
        self.counters["requests"] += 1
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        server = self._choose(robot)
        try:
            return await self._attempt(server, job, end, robot is not None)
        except RemoteError as error:
            retry = self._choose_retry(server, error.kind, job, plainer)
            if retry is None or loop.time() >= end:
                raise
        self.counters["retries"] += 1
        return await self._attempt(*retry, end, robot is not None)

    def _choose_retry(
        self, server: Server, kind: str, job: Job[Answer], plainer: Job[Answer] | None
    ) -> tuple[Server, Job[Answer]] | None:
        """Whom to ask what after a failure; None for nobody."""
        if kind == "refused":  # as another server would
            return None if plainer is None else (server, plainer)
        others = [other for other in self._ring(server) if other not in self.down]
        if others:
            return others[0], job
        if kind == "server_error":  # some refuse by it
            return server, plainer or job
        return (server, job) if kind == "connection" else None

    async def _attempt(self, server: Server, job: Job[Answer], end: float, for_robot: bool) -> Answer:
        left_s = end - asyncio.get_running_loop().time()
        try:
            try:
                return await asyncio.wait_for(job(server), left_s)
            except TimeoutError:
                raise RemoteError(f"{server.url} gave no answer within the step's deadline", "timeout") from None
        except RemoteError as error:
            self.counters[error.kind] += 1
            # A question that is no robot's may be at fault itself; only a dead server is left for it.
            at_fault = error.kind not in ("refused", "rate_limited") if for_robot else error.kind == "connection"
            if at_fault and (len(self.up) > 1 or error.kind == "connection"):
                self._leave(server)
            _empty_frames(error)
            raise

    def _choose(self, robot: str | None) -> Server:
        if robot is None:
            home = self.counters["requests"] % len(self.servers)
        else:
            home = self._homes.setdefault(robot, len(self._homes) % len(self.servers))
        server = self.servers[home]
        if server not in self.down:
            return server
        return next(other for other in self._ring(server) if other not in self.down)

    def _ring(self, server: Server) -> list[Server]:
        """The others, beginning after `server`."""
        place = self.servers.index(server)
        return [*self.servers[place + 1 :], *self.servers[:place]]

    def _leave(self, server: Server) -> None:
        """Connect to it again, which is tried from now on; until then ask it nothing, unless it is the last."""
        if len(self.up) > 1:
            self.down.add(server)
        if server in self._returning:
            return
        self._returning.add(server)
        task = asyncio.create_task(self._revive(server))
        self._revivals.add(task)  # the loop itself keeps no strong reference
        task.add_done_callback(self._revivals.discard)

    async def _revive(self, server: Server) -> None:
        while server in self._returning:
            await asyncio.sleep(_REVIVE_S)
            try:
                await self._connect(server)
            except VLMLocalError:
                self._unreachable.add(server)
                continue
            self._unreachable.discard(server)
            self._returning.discard(server)
            self.down.discard(server)
            self.counters["revived"] += 1


def _empty_frames(error: BaseException | None) -> None:
    """Forget the variables of a failure's functions, which have ended, and of what it came from.

    Some hold the failure itself, which holds them, and the request with its picture: 800 kB until
    the collector's oldest generation is due.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
