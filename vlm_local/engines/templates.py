"""A stranger's chat template is a program: it is run once within bounds before it is believed.

transformers runs it in Jinja's sandbox, which keeps it from files and Python's insides, but not from loops without an
end or text without a size. Both would keep the load of a model from ever ending. What a template does later, in a
request, is bounded by the engine's deadline.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2

from vlm_local.errors import ConfigError

try:
    import resource
except ImportError:  # not on Windows
    resource = None

MAX_LINES = 5_000_000  # of Python: ChatML's template takes some 30,000; all of them took 1.2 s
MAX_BYTES = 1 << 30
# What an expression of a template can raise, beside what bounds it.
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_TEXT = {"type": "text", "text": "Which movement comes next?"}
_CONVERSATIONS = (
    ([{"role": "user", "content": [_TEXT, {"type": "image"}, _TEXT]}], True),
    ([{"role": "user", "content": [_TEXT]}], True),
    ([{"role": "user", "content": [_TEXT]}, {"role": "assistant", "content": [_TEXT]}], False),
)


class _TooLong(BaseException):
    """Not an Exception: Jinja passes over those while it folds constants."""


def check_template(template: str, render: Callable[[list[dict[str, Any]], bool], str], folder: Path) -> None:
    """Write the conversations that requests are made of.

    render: (messages, whether an answer is to follow) -> text. Raises ConfigError for a template that takes more than
    MAX_LINES or MAX_BYTES, and for powers, whose size nothing bounds.
    """
    try:
        if any(token[1:] == ("operator", "**") for token in jinja2.Environment().lex(template)):
            raise ConfigError(f"{folder}: the chat template computes powers (**), which no prompt needs")
        with _bounded():
            for messages, is_asked in _CONVERSATIONS:
                render(messages, is_asked)
    except (_TooLong, RecursionError):
        raise ConfigError(f"{folder}: the chat template runs on and on; it may never end") from None
    except (MemoryError, OverflowError) as error:
        raise ConfigError(
            f"{folder}: the chat template makes more text than {MAX_BYTES >> 20} MB hold ({type(error).__name__})"
        ) from None
    except TEMPLATE_FAULTS:
        return  # whoever uses the text says what is wrong with it


@contextmanager
def _bounded() -> Iterator[None]:
    """Raises _TooLong in this thread after MAX_LINES of Python, and MemoryError for MAX_BYTES more than now."""
    left = MAX_LINES

    def count(frame, event, argument):
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooLong
        return count

    tracer = sys.gettrace()
    with _limited_memory():
        sys.settrace(count)
        try:
            yield
        finally:
            sys.settrace(tracer)


@contextmanager
def _limited_memory() -> Iterator[None]:
    statm = Path("/proc/self/statm")
    if resource is None or not statm.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(statm.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
    limits = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *limits]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
