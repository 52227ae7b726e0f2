"""The experts of a mixture: how transformers is to compute them, and on which GPUs torch has a kernel for them.

Each token goes through a few of many experts, whichever other tokens are there: a forward's padding takes no expert
from anyone.
"""

from typing import Any

import torch

from vlm_local.decoding.families import Family

# Of transformers' ways: `eager` reads back which experts were hit, `batched_mm` copies an expert's weights for each of
# its tokens (40 GB for 500 tokens of a 30B). On a CPU this one is the fastest, too.
IMPLEMENTATION = "grouped_mm"
_FAST_CAPABILITIES = (9, 10)  # H100, H200, B200


def has_experts(config: Any) -> bool:
    """config: of a model, as transformers reads it."""
    return bool(getattr(config.get_text_config(), "num_experts", None))


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for experts there. Without it, it reads back where each expert's tokens end."""
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in _FAST_CAPABILITIES


def measure_share(family: Family, num_tokens: int) -> float:
    """Share of the experts' weights that a forward over so many tokens reads, where these spread evenly over them."""
    text = family.language_model.config
    chosen = getattr(text, "top_k_experts", None) or text.num_experts_per_tok  # Gemma 4's name, the others'
    return 1 - (1 - chosen / text.num_experts) ** num_tokens
