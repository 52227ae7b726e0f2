"""Molmo2's image processor without torchvision, which transformers' own needs."""

from typing import Any

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ImagesKwargs

from vlm_local.decoding.views import POOLING, count_on, list_pooled


class _Options(ImagesKwargs, total=False):
    patch_size: int
    pooling_size: list[int]


class Molmo2ImageProcessorPil(PilBackend):
    """Shows a picture as transformers' does with at most one crop: resized to a square, twice."""

    valid_kwargs = _Options
    do_rescale = do_normalize = do_convert_rgb = True

    def _preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]  # called by names, of which this takes fewer
        self,
        images: list[np.ndarray],
        size: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: list[float],
        image_std: list[float],
        patch_size: int,
        pooling_size: list[int],
        return_tensors: Any,
        **kwargs,
    ) -> BatchFeature:
        """images: uint8 (3, H, W) each."""
        shape = (size.height, size.width)
        rows, columns = (side // patch_size for side in shape)
        views = []
        for image in images:
            pixels = torch.nn.functional.interpolate(torch.from_numpy(image)[None].float(), shape, mode="bilinear")
            view = pixels[0].round().numpy()  # without smoothing, and to whole numbers, as it was trained
            view = self.rescale(view, rescale_factor) if do_rescale else view
            view = self.normalize(view, image_mean, image_std) if do_normalize else view
            patches = torch.from_numpy(view).reshape(3, rows, patch_size, columns, patch_size).permute(1, 3, 2, 4, 0)
            views += [patches.reshape(rows * columns, -1).float()] * 2
        pooled = list_pooled(rows, columns, *pooling_size)
        tokens = [-(-count // pool) for count, pool in zip((rows, columns), pooling_size, strict=True)]
        data = {
            "pixel_values": torch.stack(views),
            POOLING: count_on([pooled] * len(views)),
            "image_grids": torch.tensor([tokens * 2] * len(images)),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)
