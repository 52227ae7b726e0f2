"""Text made safe to show: control characters are escaped, and secrets in URLs masked."""

import logging
import re
from typing import TextIO

_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s\"'<>]+", re.IGNORECASE)
_SECRET_FIELD = re.compile(r"([?&;][^=&;#]*(?:token|key|secret|passw|auth)[^=&;#]*=)[^&;#]+", re.IGNORECASE)
# Characters that move a cursor, begin a line, or turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def make_line(text: str) -> str:
    """One line of a model's words: without control characters, and without those that a token broke off in."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).replace("\ufffd", "").split())


def hide_secrets(text: str) -> str:
    """A text whose URLs lose passwords, the token of a path (/t/TOKEN) and of a query, so that it may be kept."""
    return _URL.sub(lambda match: _hide(match[0]), text)


def holds_secret(text: str) -> bool:
    """Whether `hide_secrets` would change the text."""
    return hide_secrets(text) != text


def _hide(url: str) -> str:
    url = re.sub(r"//[^/?#]*@", "//", url)
    return _SECRET_FIELD.sub(r"\1***", hide_token(url))


def hide_token(path: str) -> str:
    """The path of a request, or a URL, with *** for a token, wherever it stands."""
    return re.sub(r"/t/[^/?#]+", "/t/***", path)


def escape_controls(text: str, keep: str = "") -> str:
    """A text that cannot steer a terminal or forge a line of a log. keep: characters that stay as they are."""
    return _CONTROLS.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


class PlainFormatter(logging.Formatter):
    """Each record is one line, whatever its words hold; a traceback follows indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape_controls(hide_secrets(record.message))
        return super().formatMessage(record)

    def formatException(self, ei) -> str:
        return _indent(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _indent(super().formatStack(stack_info))


def _indent(trace: str) -> str:
    return "\n".join("    " + escape_controls(line) for line in hide_secrets(trace).split("\n"))


def make_log_plain(line: str) -> None:
    """Have every handler of the root logger write plain lines. line: as logging's `format`."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PlainFormatter(line))


class PlainStream:
    """A text stream that escapes what others' data would do to the terminal behind it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(escape_controls(text, "\n\t"))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
