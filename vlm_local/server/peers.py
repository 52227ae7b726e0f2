"""Connections of websocket clients, and what each of them holds."""

import logging
import math
import socket
import time
from contextlib import suppress

from websockets.exceptions import ProtocolError
from websockets.extensions import Extension
from websockets.frames import Frame

from vlm_local.errors import RequestError
from vlm_local.server.access import RateLimit
from vlm_local.server.budget import Budget

logger = logging.getLogger(__name__)

_AHEAD = 2**16  # bytes beside the frame that is worked on; the headers of frames are among them
_SMALL = 2**10  # bytes; a ping has 125 at most, and clients that send a picture in parts send 4 kB at a time
_SMALL_PER_S = 100.0


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
        self.refuse("too many large frames are on their way; send smaller pictures")

    def refuse(self, reason: str) -> None:
        logger.warning("a websocket connection is closed: %s", reason)
        self.hang_up()

    def hang_up(self) -> None:
        self.is_ended = True
        with suppress(OSError):  # it has gone by itself
            self.shutdown(socket.SHUT_RDWR)


class SmallFrames(Extension):
    """Hangs up on who sends more small frames than any client does, pings or parts of a message.

    Reading one holds the interpreter's lock as long as reading 10 kB of a picture, and 10,000 may come in one read.
    """

    def __init__(self, peer: Peer):
        self._peer = peer
        self._limit = RateLimit(_SMALL_PER_S)

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
        if len(frame.data) <= _SMALL:
            try:
                self._limit.check("")
            except RequestError:
                reason = f"more than {_SMALL_PER_S:g} frames of {_SMALL} bytes or less came in a second"
                self._peer.refuse(reason)
                raise ProtocolError(reason) from None  # nothing else that has come is looked at
        return frame

    def encode(self, frame: Frame) -> Frame:
        return frame
