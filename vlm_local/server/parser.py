"""An HTTP request on its way in: a body that is not wanted is not kept, and one of tiny chunks is refused."""

# The stubs of waitress leave out attributes that it has.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false, reportArgumentType=false

import time
from collections.abc import Callable
from io import BytesIO

from waitress.parser import HTTPRequestParser
from waitress.utilities import BadRequest, RequestEntityTooLarge

from vlm_local.server.access import Address

_GIVE_UP_READING = 2**30  # bytes of a refused body; the connection is closed instead
_HEAD = 2**14  # bytes; a longer head is refused
_MAX_BLANK = 8  # bytes of empty lines before a request; waitress copies the rest of what it was given for every four
_CHUNKED_AT_ONCE = 2**12  # waitress copies the rest of what it was given for every chunk in it
_CHUNKED_UNCHECKED = 2**16  # bytes of a chunked body before its chunks are judged
_CHUNKED_PAYLOAD = 0.9  # of the bytes sent, the least share that must be payload rather than chunk headers


class Parser(HTTPRequestParser):
    """An HTTP request on its way in. A body that is not wanted is read to its end, but not kept.

    It is read because a client hears why it was refused only after it has sent everything.
    path: as waitress sets it, "" for what is not HTTP; once `address` is known, what may stand in a log.
    """

    path = full_path = ""

    def __init__(self, adj, is_wanted: Callable[["Parser"], bool], fault: str = ""):
        """is_wanted: asked once, when the headers are read. fault: why none of what comes is read; "" where it is."""
        super().__init__(adj)
        self._fault = fault
        self.began = time.monotonic()
        self.address: Address | None = None  # once it was asked for
        self._is_wanted = is_wanted
        self._is_judged = False
        self._is_kept = True

    @property
    def num_held(self) -> int:
        """Bytes of the body that are kept."""
        return self.body_bytes_received if self._is_kept else 0

    def received(self, data):
        if self.body_rcv is None and (fault := self._fault or _find_fault(self.header_plus + data[:_HEAD])):
            self.error = BadRequest(fault)
            self.completed = True
            return len(data)
        consumed = super().received(data[:_CHUNKED_AT_ONCE] if self.chunked and self.body_rcv is not None else data)
        if isinstance(self.error, RequestEntityTooLarge):
            self._read_on()
        elif self.headers_finished and self.error is None and not self.empty:
            if not self._is_judged:
                self._is_judged = True
                if not self._is_wanted(self):
                    self.drop_body()
            self._check_chunks()
        return consumed

    def _read_on(self) -> None:
        if self.expect_continue:
            self.expect_continue = False  # it has sent nothing yet, and shall not
            return
        body = self.body_rcv
        self.drop_body()
        given_up = max(self.content_length, self.body_bytes_received) > _GIVE_UP_READING
        self.completed = given_up or body is None or bool(body.completed or body.error)

    def drop_body(self) -> None:
        if self.body_rcv is not None and self._is_kept:
            self._is_kept = False
            self.body_rcv.buf.close()
            self.body_rcv.buf = _DiscardingBuffer()

    def _check_chunks(self) -> None:
        """A body in chunks of a few bytes, or with long lines between them, costs much time and memory."""
        num_read = self.body_bytes_received
        if self.chunked and num_read > _CHUNKED_UNCHECKED and len(self.body_rcv) < _CHUNKED_PAYLOAD * num_read:
            self.error = BadRequest("the chunks of the body are too small; send Content-Length, or larger chunks")
            self.completed = True


def _find_fault(head: bytes) -> str:
    """Why this begins no HTTP request, where waitress would wait for its end; "" where it may."""
    if head.startswith(b"\x16\x03"):
        return "TLS came, and this port speaks plain HTTP; use http://, not https://"
    begun = head.lstrip()
    if len(head) - len(begun) > _MAX_BLANK:
        return "empty lines came in place of a request"
    if b"\n\n" in begun.partition(b"\r\n\r\n")[0]:
        return "the lines of a request's head must end with CR LF, not LF alone"
    return ""


class _DiscardingBuffer:
    """A buffer that counts, but keeps nothing."""

    num_bytes = 0
    getfile = BytesIO

    def append(self, data):
        self.num_bytes += len(data)

    def close(self):
        pass

    def __len__(self):
        return self.num_bytes
