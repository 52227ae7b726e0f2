"""A request as its family's model reads it, and how pictures go through the vision tower: all of one layout at once."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vlm_local.decoding.views import POOLING, count_on
from vlm_local.types import GenerationRequest


@dataclass(frozen=True, eq=False)
class PreparedPicture:
    """A picture that a prompt shows before the present one.

    key: of types.Picture. num_tokens: placeholders that stand for it. vision: as PreparedRequest's.
    """

    key: int
    num_tokens: int
    vision: Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request as its family's model reads it.

    input_ids: int64 (L,) on the CPU, image placeholders written out; the answer's tokens follow it.
    before_length: leading tokens that come before anything of the present image; their KV depends on the
        prompt's text and earlier pictures alone (0 for PaliGemma, whose prefix is one bidirectional block).
    vision: what the model's forward takes beside input_ids, batch dimension of one image included, of the present
        image: pixel_values, image_grid_thw, pixel_attention_mask ... On the CPU: a copy to a GPU from the thread
        that prepares would wait there for the forward that runs.
    earlier: the pictures before the present one, in the prompt's order.
    key: of types.Picture, of the present one, which may be among them at the next step; None where none are shown.
    blank_log: float64, what the decoder's `read_blank` gave for the blank picture; needed where the request has a
        contrast, else None.
    """

    request: GenerationRequest
    input_ids: torch.Tensor
    before_length: int
    vision: Mapping[str, torch.Tensor] = field(default_factory=dict)
    earlier: tuple[PreparedPicture, ...] = ()
    key: int | None = None
    blank_log: np.ndarray | None = None

    def join_vision(self) -> dict[str, torch.Tensor]:
        """As `vision`, of all pictures together, in the prompt's order."""
        if not self.earlier:
            return dict(self.vision)
        parts = [*(picture.vision for picture in self.earlier), self.vision]
        joined = {name: self._join(name, [part[name] for part in parts]) for name in self.earlier[0].vision}
        return {**self.vision, **joined}

    @staticmethod
    def _join(name: str, values: list[torch.Tensor]) -> torch.Tensor:
        """Pictures, or Qwen's patches and grids, follow one another, SmolVLM's (1, n, ...) in the second dimension."""
        if name == POOLING:
            return count_on(values)
        is_first = values[0].dim() < 4 or (name == "pixel_values" and values[0].dim() == 4)
        return torch.cat(pad_pictures(values), dim=0 if is_first else 1)


def pad_pictures(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Pictures (..., height, width) filled up with zeros to one size; what has fewer than four dimensions as it is."""
    if values[0].dim() < 4:
        return list(values)
    height, width = (max(value.shape[axis] for value in values) for axis in (-2, -1))
    return [
        torch.nn.functional.pad(value, (0, width - value.shape[-1], 0, height - value.shape[-2])) for value in values
    ]


Prepared = PreparedRequest | PreparedPicture


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Of one request. tokens: (n, hidden), one for each image placeholder, in order. deep: the same
    shape once for each of the first layers of Qwen3-VL, which adds them there again; else empty.
    """

    tokens: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.tokens, *self.deep))


@dataclass(frozen=True)
class PictureLayout:
    """What must be alike in pictures that go through the vision tower together.

    shape: of one request's pixel_values, without padding and a second view. grid: (time, height, width) in patches,
        () where a family has none.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]


def join_features(features: Sequence[ImageFeatures]) -> ImageFeatures:
    """Those of several pictures of one prompt, in its order."""
    if len(features) == 1:
        return features[0]
    deep = zip(*(each.deep for each in features), strict=True)
    return ImageFeatures(torch.cat([each.tokens for each in features]), tuple(map(torch.cat, deep)))


def encode_by_layout(
    prepared: Sequence[Prepared], encode: Callable[[PictureLayout, list[Any]], list[ImageFeatures]]
) -> list[ImageFeatures]:
    """Features of each one's picture, in order. encode: is given all of one layout at once."""
    groups: dict[PictureLayout, list[int]] = defaultdict(list)
    for index, item in enumerate(prepared):
        groups[find_layout(item)].append(index)
    features: dict[int, ImageFeatures] = {}
    for layout, members in groups.items():
        features |= zip(members, encode(layout, [prepared[index] for index in members]), strict=True)
    return [features[index] for index in range(len(prepared))]


def find_layout(prepared: Prepared) -> PictureLayout:
    shape, grid = prepared.vision["pixel_values"].shape, prepared.vision.get("image_grid_thw")
    places, size = prepared.vision.get("image_position_ids"), prepared.vision.get("spatial_shapes")
    if places is not None:  # Gemma 4's: column and row of each patch, negative for padding
        size = (places.amax(1) + 1).flip(1)
    if size is not None:  # patches (1, n, patch) have padding behind them
        height, width = size[0].tolist()
        return PictureLayout((shape[0], width * height, shape[2]), (1, height, width))
    if POOLING in prepared.vision:  # the second view of a picture is the first again
        return PictureLayout((1, *shape[1:]), ())
    return PictureLayout(tuple(shape), () if grid is None else tuple(grid[0].tolist()))


def take_pixels(prepared: Prepared, layout: PictureLayout) -> torch.Tensor:
    """Of the picture that has this layout."""
    return prepared.vision["pixel_values"][tuple(map(slice, layout.shape))]


class FeatureStore:
    """Features of pictures that prompts show before the present one: the language model may have to read a past frame
    at every step, the vision tower sees it once. The least recently used go when all together pass `max_bytes`.
    """

    def __init__(self, encode: Callable[[list[PreparedPicture]], list[ImageFeatures]], max_bytes: int):
        """encode: gives the features of pictures that are not kept."""
        self._encode, self._max_bytes = encode, max_bytes
        self._kept: OrderedDict[int, ImageFeatures] = OrderedDict()  # by the picture's key

    def find(self, pictures: Sequence[PreparedPicture]) -> list[ImageFeatures]:
        """Of each picture, in order."""
        unknown = {each.key: each for each in pictures if each.key not in self._kept}
        found = self._kept | dict(zip(unknown, self._encode(list(unknown.values())), strict=True))
        for each in pictures:
            self.keep(each.key, found[each.key])
        return [found[each.key] for each in pictures]

    def keep(self, key: int, features: ImageFeatures) -> None:
        self._kept[key] = features
        self._kept.move_to_end(key)
        while sum(each.nbytes for each in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)
