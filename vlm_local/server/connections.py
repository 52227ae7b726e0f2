"""What of a connection is ours and not waitress's: bodies that are too large, refusals in JSON."""

import json

from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask
from waitress.utilities import RequestEntityTooLarge

from vlm_local.wire import MAX_BODY

_GIVE_UP_READING = 2**30


class Parser(HTTPRequestParser):
    """Reads a body that is too large to its end, unkept: a client hears why only once it has sent all."""

    def received(self, data):
        consumed = super().received(data)
        if isinstance(self.error, RequestEntityTooLarge):
            if self.expect_continue:
                self.expect_continue = False  # it has sent nothing yet, and shall not
                return consumed
            body = self.body_rcv
            if not isinstance(body.buf, _Nowhere):
                body.buf.close()
                body.buf = _Nowhere()
            given_up = max(self.content_length, self.body_bytes_received) > _GIVE_UP_READING
            self.completed = bool(body.completed or body.error or given_up)
        return consumed


class _Nowhere:
    """A buffer that keeps nothing."""

    def append(self, data):
        pass

    def close(self):
        pass

    def __len__(self):
        return 0


class _ErrorTask(ErrorTask):
    """What waitress refuses by itself (not HTTP, too large), said in JSON like everything else."""

    def execute(self):
        error = self.request.error
        status = 400 if error.code == 501 else error.code  # an unknown Transfer-Encoding is the client's doing
        reason = f"{error.reason}: {error.body}"
        if status == 413:
            reason = f"the body is larger than the {MAX_BODY} bytes allowed"
        body = json.dumps({"error": reason}).encode() + b"\n"
        self.status = f"{status} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(HTTPChannel):
    parser_class = Parser
    error_task_class = _ErrorTask
