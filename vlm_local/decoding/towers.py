"""Vision towers whose parts are run here one after another: without padding, and without a value read back from a GPU,
both of which transformers' own forwards have.
"""

import functools
from typing import Any

import torch

from vlm_local.decoding.views import list_pooled

MAX_LAYOUTS = 64  # of pictures, whose constants are kept: robots have few cameras


class PlainTower:
    """The vision tower and projector of one loaded model, of a family in FAMILIES."""

    FAMILIES = ("gemma4", "lfm2-vl", "mistral3", "molmo2")

    def __init__(self, loaded: Any):
        """loaded: a `families.LoadedModel`."""
        inner = loaded.model.model
        self._tower, self._device = inner.vision_tower, loaded.device
        self._project: Any = inner.embed_vision if loaded.family == "gemma4" else inner.multi_modal_projector
        encoders = self._encode_gemma4, self._encode_lfm2, self._encode_pixtral, self._encode_molmo2
        self._encode = dict(zip(self.FAMILIES, encoders, strict=True))[loaded.family]
        self._place_patches = functools.lru_cache(MAX_LAYOUTS)(self._compute_places)
        if loaded.family == "mistral3":
            self.layers = list(self._tower.transformer.layers)
        elif loaded.family == "molmo2":
            self.layers = list(self._tower.layers)
            grid = [side // self._tower.config.patch_size for side in self._tower.config.image_size]
            self._pooled = list_pooled(*grid, *loaded.processor.image_processor.pooling_size).to(loaded.device)
            self._image_row = loaded.model.get_input_embeddings().weight[loaded.model.config.image_token_id]
        else:
            self.layers = list(self._tower.encoder.layers)

    def encode(self, pixels: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """Features (count, tokens, hidden) of `count` pictures of one layout, pixels on the model's device.

        grid: as in PictureLayout, () of families whose pixels show it.
        """
        return self._encode(pixels, grid)

    def _encode_gemma4(self, pixels: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """pixels: (count, n, patch)."""
        tower = self._tower
        places = self._place_patches(grid[1:]).expand(len(pixels), -1, -1)
        is_padding = torch.zeros_like(places[..., 0], dtype=torch.bool)
        embeds = tower.patch_embedder(pixels, places, is_padding)
        hidden = tower.encoder(embeds, attention_mask=None, pixel_position_ids=places).last_hidden_state
        length = places.shape[1] // tower.config.pooling_kernel_size**2
        pooled, _ = tower.pooler(hidden, places, is_padding, length)
        if tower.config.standardize:
            pooled = (pooled - tower.std_bias.float()) * tower.std_scale.float()
        return self._project(pooled.to(hidden.dtype))

    def _encode_lfm2(self, pixels: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """pixels: (count, n, patch)."""
        tower, size = self._tower, grid[1:]
        parts, side = tower.embeddings, tower.embeddings.position_embedding_size
        table = parts.position_embedding.weight.float().mT.unflatten(1, (side, side))[None]
        places = torch.nn.functional.interpolate(table, size, mode="bilinear", antialias=True)[0].flatten(1).mT
        embeds = parts.patch_embedding(pixels) + places.to(pixels.dtype)
        hidden = tower.post_layernorm(tower.encoder(embeds).last_hidden_state)
        tokens = self._project(hidden.unflatten(1, size))
        return tokens.view(len(pixels), -1, tokens.shape[-1])

    def _encode_pixtral(self, pixels: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """Each picture in a row of its own; transformers has all in one, with a mask between them.

        pixels: (count, 3, height, width).
        """
        tower, size = self._tower, tuple(pixels.shape[2:])
        patches = tower.patch_conv(pixels)  # (count, hidden, rows, columns)
        embeds = tower.ln_pre(patches.flatten(2).mT)
        places = self._place_patches(tuple(patches.shape[2:])).flip(-1)
        turned = tower.patch_positional_embedding(embeds, places)
        hidden = tower.transformer(embeds, position_embeddings=turned).last_hidden_state
        merged = self._project(hidden.flatten(0, 1), [size] * len(pixels))
        return merged.unflatten(0, (len(pixels), -1))

    def _encode_molmo2(self, pixels: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """Both views of each picture, which show the same (views.py). They are added to the placeholder's embedding,
        one of the rows that words have not.

        pixels: (count, patches, numbers).
        """
        tower, adapter, pooled = self._tower, self._project, self._pooled
        hidden = tower.patch_embedding(pixels.to(tower.dtype)) + tower.positional_embedding
        levels = []
        for layer in tower.layers:
            hidden = layer(hidden, None)
            levels.append(hidden)
        features = torch.cat([levels[index] for index in adapter.config.vision_feature_layer], dim=-1)
        is_patch = pooled >= 0
        patches = features[:, pooled.clamp(min=0)] * is_patch[..., None]  # (count, tokens, pooled, numbers)
        query = patches.sum(2, keepdim=True) / is_patch.sum(1)[:, None, None].to(features.dtype)
        mask = torch.zeros_like(is_patch, dtype=features.dtype).masked_fill(~is_patch, torch.finfo(features.dtype).min)
        mask = mask.repeat(len(pixels), 1)[:, None, None]
        tokens, _ = adapter.image_pooling_2d(query.flatten(0, 1), patches.flatten(0, 1), attention_mask=mask)
        view = adapter.image_projector(tokens[:, 0]).unflatten(0, (len(pixels), -1))
        return (view + self._image_row.to(view.dtype)).repeat(1, 2, 1)

    def _compute_places(self, grid: tuple[int, int]) -> torch.Tensor:
        """int64 (n, 2), column and row of a picture's patches, row by row. grid: how many rows and columns."""
        rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        return torch.stack([columns, rows], dim=-1).flatten(0, 1).to(self._device)
