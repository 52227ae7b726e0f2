"""How each family's language model is fed: where its parts are, image features, positions, attention.

transformers keeps these rules inside each model's own forward, mixed with state of `generate`; a
decoder that appends trees to a prompt needs them by themselves.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.configuration_utils import get_head_shapes
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from vlm_local.decoding.prepared import (
    FeatureStore,
    ImageFeatures,
    PictureLayout,
    Prepared,
    PreparedRequest,
    encode_by_layout,
    take_pixels,
)
from vlm_local.decoding.towers import MAX_LAYOUTS, PlainTower

_KEPT_BYTES = 1 << 27  # of image features; a picture has 0.3 MB in Qwen2-VL's 2B, 4 MB in Molmo2's 8B
WITH_STATE = ("linear_attention", "conv")  # kinds of layers that keep a state instead of KV (Qwen3.5's, LFM2's)


@dataclass(frozen=True)
class KVShape:
    """What is alike in some layers that keep KV. layers: their indices, ascending."""

    layers: tuple[int, ...]
    num_heads: int
    head_dim: int


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint in memory, ready to answer.

    family: as checkpoint.find_family names it.
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


class Family:
    """One loaded model, seen in parts.

    axes: how many numbers a position has: 3 for M-RoPE, else 1.
    is_bidirectional: the prompt is one block that attends to all of itself (PaliGemma).
    window: sliding attention's window where some layers have one (PaliGemma 2, Gemma 3, some Qwen), else None.
    cuts_blocks: only layers with a window see all of a block (find_blocks), and that within the window (Gemma 4).
    is_recurrent: some layers keep a state instead of KV. conv_kernel: tokens that their convolution sees.
    num_deep_levels: layers behind which image features are added once more (Qwen3-VL).
    kv_shapes: of the language model's KV: one, but for Gemma 4, which has another in the layers without a window.
    vision_layers: of the vision tower, none where it cannot be captured as a graph, and none of InternVL's, in which
        transformers has hooks that torch.compile cannot trace. vision_config: its configuration.
    softcap: bound of tanh on the logits (Gemma 2), or None.
    earlier: features of pictures before the present one, kept from request to request.
    """

    def __init__(self, loaded: LoadedModel):
        model = loaded.model
        text = model.config.get_text_config()
        inner = model.model
        self.language_model = inner.text_model if loaded.family.startswith("smolvlm") else inner.language_model
        self.head = model.lm_head
        self.embedding = model.get_input_embeddings()
        self.device, self.dtype = loaded.device, loaded.dtype
        self.image_token_id = model.config.image_token_id
        self.axes = 3 if loaded.family.startswith(("qwen", "glm")) else 1
        self.is_bidirectional = loaded.family.startswith("paligemma")
        layer_types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        self.kv_shapes = _list_kv_shapes(text, layer_types)
        self.window = text.sliding_window if "sliding_attention" in layer_types else None
        self.is_recurrent = not set(WITH_STATE).isdisjoint(layer_types)
        self.conv_kernel = getattr(text, "linear_conv_kernel_dim", 0) or getattr(text, "conv_L_cache", 0)
        self.cuts_blocks = getattr(text, "use_bidirectional_attention", None) == "vision"
        self._joins_pictures = loaded.family == "gemma3" or self.cuts_blocks
        self._is_molmo2 = loaded.family == "molmo2"
        self._embeds_per_layer = bool(getattr(text, "hidden_size_per_layer_input", 0))
        self._pad_token_id = getattr(text, "pad_token_id", None) or 0
        self.softcap = getattr(text, "final_logit_softcapping", None)
        self._first = 1 if self.is_bidirectional else 0  # PaliGemma counts positions from 1
        self.vision_config = model.config.vision_config
        self._merge = self.vision_config.spatial_merge_size if self.axes == 3 else 1
        self._vision_tower: Any = inner.visual if self.axes == 3 else getattr(inner, "vision_tower", None)
        self._plain_tower = PlainTower(loaded) if loaded.family in PlainTower.FAMILIES else None
        self.num_deep_levels = len(getattr(self.vision_config, "deepstack_visual_indexes", None) or ())
        self._get_features = inner.get_image_features
        self.earlier = FeatureStore(self.encode_images, _KEPT_BYTES)
        self._describe_grid = functools.lru_cache(MAX_LAYOUTS)(self._compute_grid_constants)
        # SmolVLM looks for empty tiles by their values, which a CPU must read back.
        self.can_capture_vision = not loaded.family.startswith("smolvlm")
        self.vision_layers = self._list_vision_layers(loaded.family)

    def _list_vision_layers(self, family: str) -> list[Any]:
        if self._plain_tower is not None:
            return self._plain_tower.layers
        if not self.can_capture_vision or family == "internvl":
            return []
        return list(self._vision_tower.blocks if self.axes == 3 else self._vision_tower.encoder.layers)

    def encode_images(self, prepared: Sequence[Prepared]) -> list[ImageFeatures]:
        """Of each one's picture, the present one of a request. One pass of the vision tower for each layout."""
        return encode_by_layout(prepared, self._encode_alike)

    def _encode_alike(self, layout: PictureLayout, prepared: Sequence[Prepared]) -> list[ImageFeatures]:
        stacked = torch.cat([take_pixels(each, layout) for each in prepared]).to(self.device)
        masks = [mask for each in prepared if (mask := each.vision.get("pixel_attention_mask")) is not None]
        return self.encode_pixels(stacked, layout, len(prepared), torch.cat(masks).to(self.device) if masks else None)

    def encode_pixels(
        self, pixels: torch.Tensor, layout: PictureLayout, count: int, mask: torch.Tensor | None = None
    ) -> list[ImageFeatures]:
        """Features of `count` pictures of one layout, their pixel_values concatenated on the model's device.

        No value is read back from a GPU, but for SmolVLM. mask: SmolVLM's pixel_attention_mask.
        """
        if self._plain_tower is not None:
            return [ImageFeatures(tokens.to(self.dtype)) for tokens in self._plain_tower.encode(pixels, layout.grid)]
        options = dict(self._describe_grid(layout.grid, count)) if layout.grid else {}
        if mask is not None:
            options["pixel_attention_mask"] = mask
        with _told_sizes(self._vision_tower, options.pop("sizes", None)):
            output = self._get_features(pixel_values=pixels, **options)
        deep = getattr(output, "deepstack_features", None) or ()
        return [
            ImageFeatures(tokens.to(self.dtype), tuple(level[row].to(self.dtype) for level in deep))
            for row, tokens in enumerate(output.pooler_output)
        ]

    def _compute_grid_constants(self, grid: tuple[int, ...], count: int) -> Mapping[str, Any]:
        """What Qwen's and GLM's vision towers derive from the pictures' grids, made once: they would read the grid
        back from a GPU in every layer. What is an index is on the model's device, what is a length on the CPU.
        """
        tower, grids = self._vision_tower, torch.tensor([grid] * count)
        num_patches = int(grids[0].prod())
        # For fused layers (fused.py): their attention asks for `pictures`, and is given longest lengths in vain.
        constants: dict[str, Any] = {"image_grid_thw": grids, "pictures": count, "max_seqlen": num_patches}
        constants["position_ids"] = get_vision_position_ids(grids, self._merge).to(self.device)
        if hasattr(tower, "window_size"):  # Qwen2.5
            index, lengths = get_vision_window_index(grids, self._merge, tower.window_size, tower.patch_size)
            constants |= {"window_index": index.to(self.device), "cu_window_seqlens": lengths.cpu()}
            ends = lengths[1:].unique().to(self.device)
            windows = torch.bucketize(torch.arange(num_patches, device=self.device), ends, right=True)
            constants |= {"windows": windows, "max_window_seqlen": num_patches}
        if hasattr(tower, "num_grid_per_side"):  # Qwen3
            indices, weights = get_vision_interpolation_indices_and_weights(
                grids,
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=self._merge,
            )
            constants |= {"interp_indices": indices.to(self.device), "interp_weights": weights.to(self.device)}
        if hasattr(tower, "embeddings"):  # GLM
            constants["sizes"] = torch.full((count,), num_patches, device=self.device), grids.to(self.device)
        return constants

    def list_inputs(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the language model takes of tokens (B, T) beside their embeddings: Gemma 4's small ones for each layer,
        for which a picture's tokens are padding.
        """
        if not self._embeds_per_layer:
            return {}
        words = token_ids.masked_fill(token_ids == self.image_token_id, self._pad_token_id)
        return {"per_layer_inputs": self.language_model.get_per_layer_inputs(words)}

    def hash_columns(self, prepared: PreparedRequest) -> np.ndarray:
        """int64 (L,): what each token's KV depends on, beside the tokens before it: its id, or for a placeholder the
        key of its picture, negative. The present picture's placeholders keep their id.
        """
        keys = prepared.input_ids.numpy().copy()
        if prepared.earlier:
            earlier = keys[: prepared.before_length]
            places = np.flatnonzero(earlier == self.image_token_id)
            counts = [each.num_tokens for each in prepared.earlier]
            earlier[places] = np.repeat([-each.key for each in prepared.earlier], counts)
        return keys

    def find_blocks(self, prepared: PreparedRequest) -> np.ndarray:
        """int (L,): the same number for tokens of a prompt that see one another, whichever comes first; -1 for others.

        PaliGemma's prompt is one such block, each picture of Gemma 3 and of the larger Gemma 4 is, and all pictures of
        Molmo2 together are, with the marks around them and behind their rows.
        """
        is_image = prepared.input_ids.numpy() == self.image_token_id
        if self.is_bidirectional:
            return np.zeros(len(is_image), dtype=np.int64)
        if self._is_molmo2:
            return prepared.vision["mm_token_type_ids"][0].numpy() - 1
        begins = is_image & ~np.concatenate([[False], is_image[:-1]])
        return np.where(is_image & self._joins_pictures, np.cumsum(begins), -1)

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
        grids = iter([each.vision["image_grid_thw"][0].tolist() for each in (*prepared.earlier, prepared)])
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


@contextmanager
def _told_sizes(tower: Any, sizes: tuple[torch.Tensor, torch.Tensor] | None) -> Iterator[None]:
    """While open, GLM's embedding of positions is given the pictures' numbers of patches and grids on its own device.

    The tower hands it those that lie on the CPU, where its attention reads them in every layer.
    """
    hook = sizes and tower.embeddings.register_forward_pre_hook(lambda module, given: (given[0], *sizes, *given[3:]))
    try:
        yield
    finally:
        if hook:
            hook.remove()


def _list_kv_shapes(text: Any, layer_types: Sequence[str]) -> tuple[KVShape, ...]:
    """Of a language model's configuration. Gemma 4's last layers read the KV of earlier ones and keep none."""
    num_keeping = len(layer_types) - getattr(text, "num_kv_shared_layers", 0)
    keeping = [index for index, kind in enumerate(layer_types[:num_keeping]) if kind not in WITH_STATE]
    heads, dims = get_head_shapes(text)  # each a number, or a list of one for each layer
    shapes = defaultdict(list)
    for index in keeping:
        shapes[tuple(each if isinstance(each, int) else each[index] for each in (heads, dims))].append(index)
    return tuple(KVShape(tuple(layers), *shape) for shape, layers in shapes.items())
