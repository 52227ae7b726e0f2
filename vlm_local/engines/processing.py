"""An image and a prompt -> what a family's model reads."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from vlm_local.decoding.types import PreparedRequest
from vlm_local.engines.templates import check_template
from vlm_local.engines.words import Disarmer
from vlm_local.errors import ConfigError, RequestError
from vlm_local.types import GenerationRequest, Prompt

MAX_PIXELS = 1280 * 28 * 28  # a larger picture is scaled down: 1,280 image tokens on Qwen
MAX_ASPECT = 190  # Qwen's image processor refuses 200
MAX_PROMPT_TOKENS = 1536  # of text; more, from one client, would keep every robot of this engine waiting

_NOT_FOR_THE_MODEL = ("input_ids", "attention_mask", "labels")
_MARK = re.compile(r"<\S+>")
_PROCESSORS = {
    "qwen2-vl": "Qwen2VLProcessor",
    "qwen2.5-vl": "Qwen2_5_VLProcessor",
    "qwen3-vl": "Qwen3VLProcessor",
    "paligemma": "PaliGemmaProcessor",
    "paligemma2": "PaliGemmaProcessor",
    "smolvlm2": "SmolVLMProcessor",
}


def load_processor(folder: Path, family: str) -> Any:
    """The family's own processor, of images and text only.

    transformers cannot build a video processor without torchvision, so the stock classes of Qwen
    and SmolVLM fail to load there; nobody shows a video here, so they are loaded without one.
    """
    stock = getattr(transformers, _PROCESSORS[family])
    kind = _drop_video(stock) if _is_chat(family) else stock
    # Pillow's backend also where torchvision is present: the same pixels on every machine.
    try:
        processor = kind.from_pretrained(folder, backend="pil", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(f"{folder} has no usable tokenizer and image processor: {error}") from error
    if _is_chat(family) and not (processor.chat_template or processor.tokenizer.chat_template):
        raise ConfigError(f"{folder} has no chat template (chat_template.jinja), which {family} cannot do without")
    if _is_chat(family):
        template = processor.chat_template or processor.tokenizer.chat_template
        check_template(template, lambda messages, is_asked: _apply_template(processor, messages, is_asked), folder)
    if family == "smolvlm2":
        # Splitting blows a 256x256 picture up to 2048x2048 and 17 tiles, which show nothing more and
        # take six times as long to prepare. One tile is enough.
        images = processor.image_processor
        images.do_image_splitting, images.size = False, {"longest_edge": images.max_image_size["longest_edge"]}
    return processor


def _drop_video(stock: type) -> type:
    class WithoutVideo(stock):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, image_seq_len=None, **kwargs):
            if image_seq_len is not None:
                kwargs["image_seq_len"] = image_seq_len
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    return WithoutVideo


def find_lead(processor: Any, family: str) -> str:
    """What the chat template puts between the prompt's end and an assistant's words: SmolVLM's " "."""
    if not _is_chat(family):
        return ""
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "stop"}]}
    asked = _apply_template(processor, [question], add_generation_prompt=True)
    answered = _apply_template(processor, [question, answer], add_generation_prompt=False)
    return answered[len(asked) :].partition("stop")[0] if answered.startswith(asked) else ""


def _is_chat(family: str) -> bool:
    return not family.startswith("paligemma")


def _apply_template(processor: Any, messages: list[dict], add_generation_prompt: bool) -> str:
    tokenizer = processor.tokenizer  # SmolVLM's processor would ask its video processor first
    return tokenizer.apply_chat_template(
        messages,
        chat_template=processor.chat_template or tokenizer.chat_template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )


class Processing:
    """Prepares requests for one family; keeps nothing between them."""

    def __init__(self, processor: Any, family: str, dtype: torch.dtype):
        self._processor = processor
        added = processor.tokenizer.added_tokens_decoder.values()
        # Not all that steer a model are called special: Qwen3's <think>, PaliGemma's <loc0001>.
        control = {token.content for token in added if token.special or _MARK.fullmatch(token.content)}
        self._disarm = Disarmer(control)
        self._control_ids = set(processor.tokenizer.convert_tokens_to_ids(sorted(control)))
        self._dtype = dtype
        self._is_chat = _is_chat(family)

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Raises RequestError for a picture that the family's image processor cannot take, for words
        that would steer the model, and for too long a text.
        """
        self._disarm.check_sentences(request.sentences)
        inputs = self._processor(
            text=[self.render(request.prompt)], images=[self._fit(request.image)], return_tensors="pt"
        )
        input_ids = inputs["input_ids"][0]
        vision = {name: self._convert(value) for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        is_image = input_ids == self._processor.image_token_id
        num_text = int((~is_image).sum())
        if num_text > MAX_PROMPT_TOKENS:
            raise RequestError(
                f"the text takes {num_text} tokens, the choices of a question included; "
                f"{MAX_PROMPT_TOKENS} are allowed: use fewer or shorter words"
            )
        return PreparedRequest(request, input_ids, int(is_image.int().argmax()), vision)

    def render(self, prompt: Prompt) -> str:
        """Prompt -> the model's whole text with one image placeholder."""
        before, after = self._make_plain(prompt.before), self._make_plain(prompt.after)
        if not self._is_chat:
            # Written into the text, the placeholder is repeated, and <bos> and a newline are added.
            return self._processor.image_token + " ".join(part for part in (before, after) if part)
        content = [{"type": "text", "text": before + "\n"}, {"type": "image"}, {"type": "text", "text": "\n" + after}]
        messages = [{"role": "user", "content": content if before else content[1:]}]
        return _apply_template(self._processor, messages, add_generation_prompt=True)

    def _make_plain(self, text: str) -> str:
        plain = self._disarm(text)
        if not plain.isascii():  # a tokenizer may take other characters for those of a token
            ids = self._processor.tokenizer(plain, add_special_tokens=False)["input_ids"]
            if self._control_ids.intersection(ids):
                raise RequestError("the words hold a control token of the model; leave it out")
        return plain

    def _fit(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise RequestError(f"the image is {width}x{height}; a side may be {MAX_ASPECT} times the other at most")
        if height * width <= MAX_PIXELS:
            return image
        scale = (MAX_PIXELS / (height * width)) ** 0.5
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))

    def _convert(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._dtype) if value.is_floating_point() else value
