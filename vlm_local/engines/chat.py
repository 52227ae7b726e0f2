"""What a model's chat template writes around a prompt and around an answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_local.engines.templates import TEMPLATE_FAULTS
from vlm_local.errors import ConfigError

_OPEN, _CLOSE = "<think>", "</think>"
_ANSWER = "stop"


@dataclass(frozen=True)
class Frame:
    """lead: text between the prompt's end and an answer, SmolVLM's " ". end_token_id: the token behind an
    answer, None where the template writes nothing there.
    """

    lead: str = ""
    end_token_id: int | None = None


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


def apply_template(processor: Any, messages: list[dict], add_generation_prompt: bool) -> str:
    """The whole text of a conversation. A block for thoughts that the template opens for the answer is closed."""
    text = processor.tokenizer.apply_chat_template(  # SmolVLM's processor would ask its video processor first
        messages,
        chat_template=processor.chat_template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        enable_thinking=False,
    )
    if add_generation_prompt and text.rstrip().endswith(_OPEN):
        return f"{text.rstrip()}\n\n{_CLOSE}\n\n"  # as Qwen's templates write it without thoughts
    return text


def find_frame(processor: Any, folder: Path) -> Frame:
    """Read from an example what stands around an answer. Raises ConfigError for a template that has no such places."""
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
    try:
        asked = apply_template(processor, [question], add_generation_prompt=True)
        answered = apply_template(processor, [question, answer], add_generation_prompt=False)
    except TEMPLATE_FAULTS as error:
        raise ConfigError(f"{folder}: the chat template cannot write a question and an answer: {error}") from error
    if asked.rfind(_OPEN) > asked.rfind(_CLOSE):
        raise ConfigError(
            f"{folder}: the chat template opens a {_OPEN} block for thoughts before an answer, which only phrases are; "
            f"take the model that does not think, or a template that closes the block"
        )
    before, found, behind = answered.rpartition(_ANSWER)
    if not found:
        raise ConfigError(f"{folder}: the chat template does not write an assistant's words into the conversation")
    lead = before[len(asked) :] if before.startswith(asked) else ""
    return Frame(lead, _read_end(processor.tokenizer, behind, folder))


def _read_end(tokenizer: Any, behind: str, folder: Path) -> int | None:
    if not behind.strip():
        return None
    first = tokenizer(behind, add_special_tokens=False)["input_ids"][0]
    if first not in tokenizer.added_tokens_decoder:
        raise ConfigError(
            f"{folder}: behind an answer, the chat template writes {behind!r}, which does not begin with a control "
            f"token that could end a phrase; mend the template (chat_template.jinja)"
        )
    return first
