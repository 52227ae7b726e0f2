"""The errors of this package. A message says what was expected, what came and what to do."""

import difflib
from collections.abc import Callable, Iterable


class VLMLocalError(Exception):
    """Base class; the command line prints it as one paragraph and exits with 2."""


class ConfigError(VLMLocalError):
    """A flag, file, checkpoint or machine that cannot be used as asked."""


class RequestError(VLMLocalError):
    """A request that the client must change: answered with a 4xx and this sentence.

    `status` is the HTTP status, 400 unless another says more.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class GrammarError(ConfigError):
    """A grammar that cannot be used, or a sentence that a grammar does not hold."""


class DataError(VLMLocalError):
    """A recorded data set (or one record of it) that cannot be read; names file and offset."""


Report = Callable[[DataError], None]  # is given every record that cannot be read


def refuse(error: DataError) -> None:
    """The Report that raises what it is given."""
    raise error


class EngineError(VLMLocalError):
    """The model's side failed: it raised, ran out of time or memory, or left the grammar."""


class EngineClosed(EngineError):
    """The engine was closed while a request waited: the process is ending."""


REMOTE_KINDS = (
    "unauthorized",
    "not_found",
    "rate_limited",
    "server_error",
    "refused",
    "timeout",
    "connection",
    "malformed",
    "truncated",
    "outside_grammar",
)


class RemoteError(EngineError):
    """A server that answers for the model failed; `kind`, one of REMOTE_KINDS, says how."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):
        """To be pickled: an exception is made again from its message alone."""
        return type(self), (str(self), self.kind)


def suggest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the name nearest to a misspelt one, "" where none is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1)
    return f"; did you mean {names[near[0]]}?" if near else ""
