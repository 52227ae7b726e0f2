"""A folder's chat template, which is a stranger's program: it is run once within bounds before it is believed.

transformers runs it in Jinja's sandbox, which keeps it from files and Python's insides, but not from loops without an
end or text without a size; both would keep the load of a model from ever ending. What a template does later, in a
request, is bounded by the engine's deadline.
"""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from vlm_local.engines.processing import THOUGHTS_CLOSE, THOUGHTS_OPEN, apply_template
from vlm_local.errors import ConfigError

MAX_TEMPLATE_LINES = 5_000_000  # of Python: ChatML's template takes some 30,000; all of them took 1.2 s
MAX_TEMPLATE_BYTES = 1 << 30
# What an expression of a template can raise, beside what bounds it.
TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_TEXT = {"type": "text", "text": "Which movement comes next?"}
_QUESTION, _REPLY = ({"role": role, "content": [_TEXT]} for role in ("user", "assistant"))
_CONVERSATIONS = (
    ([{"role": "user", "content": [_TEXT, {"type": "image"}, _TEXT]}], True),
    ([_QUESTION], True),
    ([_QUESTION, _REPLY], False),
    ([_QUESTION, _REPLY, _QUESTION], False),
)

_ANSWER = "stop"


@dataclass(frozen=True)
class AnswerFrame:
    """lead: text between the prompt's end and an answer, SmolVLM's " ". end_token_id: the token behind an
    answer, None where the template writes nothing there. next_token_id: with which another question begins then, as
    GLM's answers end; None where that is no control token.
    """

    lead: str = ""
    end_token_id: int | None = None
    next_token_id: int | None = None


def pick_template(processor: Any, folder: Path) -> str:
    """The folder's only template, or of several with names the one that is called "default"."""
    found = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise ConfigError(
                f"{folder} has the chat templates {', '.join(sorted(found))}; expected one that is called default"
            )
        found = found["default"]
    if not found:
        raise ConfigError(f"{folder} has no chat template (chat_template.jinja), which its family cannot do without")
    return found


def find_frame(processor: Any, folder: Path) -> AnswerFrame:
    """Read from an example what stands around an answer. Raises ConfigError for a template that has no such places."""
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    answer: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}

    def write(*messages: dict[str, Any]) -> str:
        try:
            return apply_template(processor, list(messages), add_generation_prompt=len(messages) == 1)
        except TEMPLATE_FAULTS as error:
            raise ConfigError(f"{folder}: the chat template cannot write a question and an answer: {error}") from error

    asked, answered = write(question), write(question, answer)
    if str(answer["content"]) in answered:  # GLM-4.1V's template takes an answer's words alone
        answer["content"] = _ANSWER
        answered = write(question, answer)
    if asked.rfind(THOUGHTS_OPEN) > asked.rfind(THOUGHTS_CLOSE):
        raise ConfigError(
            f"{folder}: the chat template opens a {THOUGHTS_OPEN} block for thoughts before an answer, which only "
            f"phrases are; take the model that does not think, or a template that closes the block"
        )
    before, found, behind = answered.rpartition(_ANSWER)
    if not found:
        raise ConfigError(f"{folder}: the chat template does not write an assistant's words into the conversation")
    lead = before[len(asked) :] if before.startswith(asked) else ""
    if not behind.strip():
        follows = write(question, answer, question).rpartition(_ANSWER)[2]
        return AnswerFrame(lead, None, _read_control(processor.tokenizer, follows))
    end = _read_control(processor.tokenizer, behind)
    if end is None:
        raise ConfigError(
            f"{folder}: behind an answer, the chat template writes {behind!r}, which does not begin with a control "
            f"token that could end a phrase; mend the template (chat_template.jinja)"
        )
    return AnswerFrame(lead, end)


def _read_control(tokenizer: Any, text: str) -> int | None:
    """The control token with which a text begins, or None."""
    first = next(iter(tokenizer(text, add_special_tokens=False)["input_ids"]), None)
    return first if first in tokenizer.added_tokens_decoder else None


class _TooLong(BaseException):
    """Not an Exception: Jinja passes over those while it folds constants."""


def check_template(template: str, render: Callable[[list[dict[str, Any]], bool], str], folder: Path) -> None:
    """Write the conversations that requests are made of.

    render: (messages, whether an answer is to follow) -> text. Raises ConfigError for a template that takes more than
    MAX_TEMPLATE_LINES or MAX_TEMPLATE_BYTES, and for powers, whose size nothing bounds.
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
            f"{folder}: the chat template makes more text than {MAX_TEMPLATE_BYTES >> 20} MB hold "
            f"({type(error).__name__})"
        ) from None
    except TEMPLATE_FAULTS:
        return  # whoever uses the text says what is wrong with it


@contextmanager
def _bounded() -> Iterator[None]:
    """Bound a template's run: _TooLong after MAX_TEMPLATE_LINES of Python, MemoryError above MAX_TEMPLATE_BYTES more
    than are in use now. It counts in this thread only.
    """
    left = MAX_TEMPLATE_LINES

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
    if not statm.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(statm.read_text().split()[0]) * resource.getpagesize() + MAX_TEMPLATE_BYTES
    limits = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *limits]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
