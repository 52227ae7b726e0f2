"""How each family's language model is fed: where its parts are, image features, positions, attention.

transformers keeps these rules inside each model's own forward, mixed with state of `generate`; a
decoder that appends trees to a prompt needs them by themselves.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm_local.decoding.types import LoadedModel, PreparedRequest

_FOR_IMAGES = ("pixel_values", "image_grid_thw", "pixel_attention_mask")


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Of one request. tokens: (n, hidden), one for each image placeholder, in order. deep: the same
    shape once for each of the first layers of Qwen3-VL, which adds them there again; else empty.
    """

    tokens: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()


class Family:
    """One loaded model, seen in parts.

    axes: how many numbers a position has: 3 for M-RoPE, else 1.
    is_bidirectional: the prompt is one block that attends to all of itself (PaliGemma).
    window: sliding attention's window where some layers have one (PaliGemma 2), else None.
    softcap: bound of tanh on the logits (Gemma 2), or None.
    """

    def __init__(self, loaded: LoadedModel):
        model = loaded.model
        text = model.config.get_text_config()
        inner = model.model
        self.language_model = inner.text_model if loaded.family == "smolvlm2" else inner.language_model
        self.head = model.lm_head
        self.embedding = model.get_input_embeddings()
        self.device, self.dtype = loaded.device, loaded.dtype
        self.image_token_id = model.config.image_token_id
        self.axes = 3 if loaded.family.startswith("qwen") else 1
        self.is_bidirectional = loaded.family.startswith("paligemma")
        self.window = getattr(text, "sliding_window", None) if loaded.family == "paligemma2" else None
        self.softcap = getattr(text, "final_logit_softcapping", None)
        self._first = 1 if self.is_bidirectional else 0  # PaliGemma counts positions from 1
        self._merge = model.config.vision_config.spatial_merge_size if self.axes == 3 else 1
        self._get_features = inner.get_image_features

    def encode_images(self, prepared: Sequence[PreparedRequest]) -> list[ImageFeatures]:
        """One pass of the vision tower for all pictures of the same shape."""
        groups = defaultdict(list)
        for index, item in enumerate(prepared):
            groups[tuple(item.vision["pixel_values"].shape)].append(index)
        features: list = [None] * len(prepared)
        for members in groups.values():
            vision = [prepared[index].vision for index in members]
            stacked = {name: torch.cat([v[name] for v in vision]) for name in _FOR_IMAGES if name in vision[0]}
            output = self._get_features(**stacked)
            deep = getattr(output, "deepstack_features", None) or ()
            for row, index in enumerate(members):
                tokens = output.pooler_output[row].to(self.dtype)
                features[index] = ImageFeatures(tokens, tuple(level[row].to(self.dtype) for level in deep))
        return features

    def position_prompt(self, prepared: PreparedRequest) -> tuple[np.ndarray, int]:
        """Positions (axes, L) of a prompt's tokens, and the position of the token that follows it.

        M-RoPE (Wang et al., Qwen2-VL, 2024, section 2.1): text counts on alike in all three axes
        (time, height, width); an image of h x w merged patches takes the grid's coordinates, and text
        goes on behind the larger of the two.
        """
        ids = prepared.input_ids.numpy()
        if self.axes == 1:
            return self._first + np.arange(len(ids))[None], self._first + len(ids)
        is_image = ids == self.image_token_id
        grids = iter(prepared.vision["image_grid_thw"].tolist())
        borders = [0, *(np.flatnonzero(np.diff(is_image)) + 1), len(ids)]
        parts, start = [], 0
        for begin, end in itertools.pairwise(borders):
            if is_image[begin]:
                time, height, width = next(grids)
                grid = (time, height // self._merge, width // self._merge)
                parts.append(start + np.indices(grid).reshape(3, -1))
                start += max(grid[1:])
            else:
                parts.append(np.tile(start + np.arange(end - begin), (3, 1)))
                start += end - begin
        return np.concatenate(parts, axis=1), start
