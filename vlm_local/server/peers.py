"""Connections of websocket clients, and what each of them holds."""

import logging
import math
import socket
import time
from contextlib import suppress

from vlm_local.server.budget import Budget

logger = logging.getLogger(__name__)

_AHEAD = 2**16  # bytes beside the frame that is worked on; the headers of frames are among them


class Peer(socket.socket):
    """A connection that counts what it reads. Any thread may call it.

    waits_since: monotonic seconds since it is the client's turn, to send or to read, None while we work for it.
    """

    def __init__(self, accepted: socket.socket, budget: Budget):
        """accepted: taken over."""
        super().__init__(fileno=accepted.detach())
        self.waits_since: float | None = time.monotonic()
        self.is_open = False  # the handshake is done
        self.has_acted = False  # an action was decided
        self.is_ended = False  # it was told to end
        self._budget = budget
        self._num_read = 0  # bytes so far; written by the thread that reads
        self._num_answered = self._num_in_work = 0  # bytes of frames; written by the thread that works

    def rank(self, spares_handshakes: bool) -> tuple[bool, bool, float]:
        """The smallest makes room for others: who has brought nothing yet, and has waited longest."""
        waits_since = math.inf if self.waits_since is None else self.waits_since
        return self.has_acted, self.is_open != spares_handshakes, waits_since

    @property
    def num_held(self) -> int:
        return 0 if self.is_ended else max(0, self._num_read - self._num_answered)

    @property
    def may_end(self) -> bool:
        return self.num_held - self._num_in_work > _AHEAD

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        data = super().recv(bufsize, flags)
        self._num_read += len(data)
        if self.may_end:
            self._budget.keep()
        return data

    def take(self, num_bytes: int) -> None:
        """A frame of so many bytes is worked on; 0 where the one before is answered and no other has come yet."""
        self._num_answered += self._num_in_work
        self._num_in_work = num_bytes

    def end(self) -> None:
        logger.warning(
            "a websocket connection is closed: too many large frames are on their way; send smaller pictures"
        )
        self.hang_up()

    def hang_up(self) -> None:
        self.is_ended = True
        with suppress(OSError):  # it has gone by itself
            self.shutdown(socket.SHUT_RDWR)
