"""Turns an image and a prompt into the tensors that a family's model reads."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm_local.decoding.prepared import PreparedPicture, PreparedRequest
from vlm_local.engines import ControlTokenFilter, scale_down
from vlm_local.errors import RequestError
from vlm_local.types import GenerationRequest, Picture, Prompt

MAX_ASPECT = 190  # Qwen's image processor refuses 200
# Of text. Every robot of this engine waits for the longest prompt's prefill, so its length is bounded.
MAX_PROMPT_TOKENS = 1536
THOUGHTS_OPEN, THOUGHTS_CLOSE = "<think>", "</think>"

_MAX_PICTURE_BYTES = 1 << 28  # of prepared pictures that are kept, because a prompt shows them at every step

_NOT_FOR_THE_MODEL = ("input_ids", "attention_mask", "labels")
_MARK = re.compile(r"<\S+>")
# The system prompt that Mistral's templates add unasked: up to 500 tokens of dates, of tools and of when to ask back.
# Mistral's own library writes none.
_UNASKED = re.compile(r"^(<s>)?\[SYSTEM_PROMPT\][^[]*Mistral AI[^[]*\[/SYSTEM_PROMPT\]")


def is_chat(family: str) -> bool:
    """Whether the family reads its prompts through a chat template."""
    return not family.startswith("paligemma")


def apply_template(processor: Any, messages: list[dict], add_generation_prompt: bool) -> str:
    """The whole text of a conversation. A block for thoughts that the template opens for the answer is closed."""
    text = processor.tokenizer.apply_chat_template(  # SmolVLM's processor would ask its video processor first
        messages,
        chat_template=processor.chat_template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        enable_thinking=False,
    )
    text = _UNASKED.sub(r"\1", text)
    if add_generation_prompt and text.rstrip().endswith(THOUGHTS_OPEN):
        return f"{text.rstrip()}\n\n{THOUGHTS_CLOSE}\n\n"  # as Qwen's templates write it without thoughts
    return text


def find_placeholder(processor: Any) -> str:
    """What stands in a text for a picture, its tokens written as one: Gemma 3 has paragraphs and marks around them."""
    whole = getattr(processor, "full_image_sequence", None)
    if whole is None:  # Molmo2's token of a picture is none of those that the model reads for it
        return processor.tokenizer.convert_ids_to_tokens(processor.image_token_ids[0])
    token = processor.tokenizer.image_token
    return whole.replace(token * processor.image_seq_length, token)


@dataclass(frozen=True, eq=False)
class _ReadPicture:
    """A picture as the model reads it. input_ids: what its placeholder in a text becomes; num_tokens of them are image
    tokens.

    types: under which name the model is told which tokens are a picture's, None where it is not.
    """

    input_ids: torch.Tensor
    num_tokens: int
    vision: Mapping[str, torch.Tensor]
    types: str | None

    @property
    def num_bytes(self) -> int:
        return sum(value.nbytes for value in self.vision.values())


class Processing:
    """Prepares requests for one family. Keeps the pictures that come before the present one, nothing else."""

    def __init__(self, processor: Any, family: str, dtype: torch.dtype):
        self._processor = processor
        added = processor.tokenizer.added_tokens_decoder.values()
        # Not all that steer a model are called special: Qwen3's <think>, PaliGemma's <loc0001>.
        control = {token.content for token in added if token.special or _MARK.fullmatch(token.content)}
        self._filter_tokens = ControlTokenFilter(control)
        self._control_ids = set(processor.tokenizer.convert_tokens_to_ids(sorted(control)))
        self._dtype = dtype
        self._is_chat = is_chat(family)
        self._read: OrderedDict[int, _ReadPicture] = OrderedDict()  # by key; the last used stands last
        self._image_id = processor.image_token_ids[0]
        self._placeholder = find_placeholder(processor)
        # What Molmo2's processor would write before a text, since its template does not.
        self._begin = (processor.tokenizer.bos_token or processor.tokenizer.eos_token) if family == "molmo2" else ""
        # What a tokenizer makes of the text around a picture's tokens in a placeholder.
        alone = processor.tokenizer(self._begin + self._placeholder, add_special_tokens=False)["input_ids"]
        place = alone.index(self._image_id)
        self._num_around = place, len(alone) - 1 - place

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Raises RequestError for a picture that the family's image processor cannot take, for words
        that would steer the model, and for too long a text.
        """
        self._filter_tokens.check_sentences(request.sentences)
        if request.prompt.pictures:
            return self._prepare_sequence(request)
        text = self.render(request.prompt)
        inputs = self._processor(
            text=[text],
            images=[self._fit(request.image)],
            return_tensors="pt",
            add_special_tokens=not self._has_begun(text),
        )
        input_ids = inputs["input_ids"][0]
        vision = {name: self._convert(value) for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        is_image = input_ids == self._image_id
        _check_length(int((~is_image).sum()))
        return PreparedRequest(request, input_ids, int(is_image.int().argmax()), vision)

    def _prepare_sequence(self, request: GenerationRequest) -> PreparedRequest:
        """A prompt with several pictures. Each is prepared alone, so that one that was shown before is not again."""
        if not self._is_chat:
            raise RequestError("this model reads one picture, but the prompt shows several: use no examples, no frames")
        earlier = [(picture, self._read_again(picture)) for picture in request.prompt.pictures]
        present = self._read_picture(request.image)
        text = self.render(request.prompt).replace(self._processor.image_token, self._placeholder)
        add = not self._has_begun(text)
        text_ids = torch.tensor(self._processor.tokenizer(text, add_special_tokens=add)["input_ids"])
        places = (text_ids == self._image_id).nonzero()[:, 0].tolist()
        ends = [*places[1:], len(text_ids)]
        parts = [text_ids[: places[0]]]
        for place, end, read in zip(places, ends, [*(read for _, read in earlier), present], strict=True):
            parts += [read.input_ids, text_ids[place + 1 : end]]
        input_ids = torch.cat(parts)
        is_image = input_ids == self._image_id
        _check_length(int((~is_image).sum()))
        is_shown = torch.isin(input_ids, torch.tensor(self._processor.image_token_ids))
        types = {present.types: is_shown[None].long()} if present.types else {}
        first = int(is_image.nonzero()[-present.num_tokens])
        pictures = tuple(PreparedPicture(picture.key, read.num_tokens, read.vision) for picture, read in earlier)
        key = Picture(self._fit(request.image)).key  # as a past frame will have it
        return PreparedRequest(request, input_ids, first, {**present.vision, **types}, pictures, key)

    def _read_again(self, picture: Picture) -> _ReadPicture:
        if picture.key in self._read:
            self._read.move_to_end(picture.key)
            return self._read[picture.key]
        read = self._read[picture.key] = self._read_picture(picture.pixels)
        while sum(each.num_bytes for each in self._read.values()) > _MAX_PICTURE_BYTES:
            self._read.popitem(last=False)
        return read

    def _read_picture(self, pixels: np.ndarray) -> _ReadPicture:
        token = self._processor.image_token
        text = [self._begin + token]
        inputs = self._processor(text=text, images=[self._fit(pixels)], return_tensors="pt", add_special_tokens=False)
        num_before, num_behind = self._num_around
        ids = inputs["input_ids"][0]
        ids = ids[num_before : len(ids) - num_behind]
        types = next((name for name in inputs if name.endswith("token_type_ids")), None)
        vision = {
            name: self._convert(value) for name, value in inputs.items() if name not in (*_NOT_FOR_THE_MODEL, types)
        }
        return _ReadPicture(ids, int((ids == self._image_id).sum()), vision, types)

    def render(self, prompt: Prompt) -> str:
        """Prompt -> the model's whole text with one placeholder for each picture."""
        if not self._is_chat:
            # Written into the text, the placeholder is repeated, and <bos> and a newline are added.
            before, after = self._make_plain(prompt.before), self._make_plain(prompt.after)
            return self._processor.image_token + " ".join(part for part in (before, after) if part)
        content = [
            {"type": "text", "text": self._make_plain(part)} if isinstance(part, str) else {"type": "image"}
            for part in prompt.list_parts()
        ]
        messages = [{"role": "user", "content": content}]
        text = apply_template(self._processor, messages, add_generation_prompt=True)
        return text if text.startswith(self._begin) else self._begin + text

    def _has_begun(self, text: str) -> bool:
        """Whether the template wrote the token that the tokenizer would put before a text, as Gemma's does."""
        begin = self._processor.tokenizer.bos_token
        return self._is_chat and begin is not None and text.startswith(begin)

    def _make_plain(self, text: str) -> str:
        plain = self._filter_tokens(text)
        if not plain.isascii():  # a tokenizer may take other characters for those of a token
            ids = self._processor.tokenizer(plain, add_special_tokens=False)["input_ids"]
            if self._control_ids.intersection(ids):
                raise RequestError("the words hold a control token of the model; leave it out")
            _check_length(len(ids))  # before the picture is prepared: who sends such words costs robots less
        return plain

    def _fit(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise RequestError(f"the image is {width}x{height}; a side may be {MAX_ASPECT} times the other at most")
        return scale_down(image)

    def _convert(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._dtype) if value.is_floating_point() else value


def _check_length(num_tokens: int) -> None:
    if num_tokens > MAX_PROMPT_TOKENS:
        raise RequestError(
            f"the text takes {num_tokens} tokens, the choices of a question included; "
            f"{MAX_PROMPT_TOKENS} are allowed: use fewer or shorter words"
        )
