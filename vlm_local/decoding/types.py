"""What a decoder is given: a loaded model and requests turned into tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_local.types import GenerationRequest


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint in memory, ready to answer.

    family: "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "paligemma", "paligemma2", "smolvlm" or "smolvlm2".
    eos_token_id: the one token that ends an answer, as the chat template has it; the tokenizer's own, too.
    lead: what the model writes between the prompt's end and an answer: " " behind "Assistant:".
    """

    model: Any
    tokenizer: Any
    processor: Any
    family: str
    device: torch.device
    dtype: torch.dtype
    eos_token_id: int
    lead: str = ""


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request as its family's model reads it.

    input_ids: int64 (L,) on the CPU, image placeholders written out; the answer's tokens follow it.
    before_length: leading tokens that come before anything of the image; their KV depends on the
        prompt's text alone (0 for PaliGemma, whose prefix is one bidirectional block).
    vision: what the model's forward takes beside input_ids, batch dimension of one image included:
        pixel_values, image_grid_thw, pixel_attention_mask ... On the CPU: a copy to a GPU from the thread
        that prepares would wait there for the forward that runs.
    """

    request: GenerationRequest
    input_ids: torch.Tensor
    before_length: int
    vision: Mapping[str, torch.Tensor] = field(default_factory=dict)
