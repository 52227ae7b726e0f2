"""LFM2-VL's image processor: transformers' own cannot be loaded without torchvision."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, Siglip2ImageProcessorPil
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorKwargs


class _Options(Siglip2ImageProcessorKwargs, total=False):
    encoder_patch_size: int
    downsample_factor: int
    min_image_tokens: int
    max_image_tokens: int
    return_row_col_info: bool


class NaflexImageProcessorPil(Siglip2ImageProcessorPil):
    """Patches as Lfm2VlImageProcessor makes them of a picture that it does not cut into tiles.

    Only a strip of at most 16 pixels by more than 2,000 gets more of them.
    """

    valid_kwargs = _Options
    encoder_patch_size = 16
    downsample_factor = 2
    min_image_tokens = 64
    max_image_tokens = 256
    return_row_col_info = True
    tile_size, use_thumbnail = 512, False  # Lfm2VlProcessor asks for both

    def _preprocess(self, images: Sequence[np.ndarray], **options: Any) -> BatchFeature:
        """images: (3, H, W) each. A side becomes a multiple of a token's, and the tokens as many as are allowed."""
        side = options["encoder_patch_size"] * options["downsample_factor"]
        least, most = (options[name] * side**2 for name in ("min_image_tokens", "max_image_tokens"))
        sizes = [smart_resize(image.shape[1], image.shape[2], side, least, most) for image in images]
        resized = [
            self.resize(image, SizeDict(height=height, width=width), options["resample"])
            for image, (height, width) in zip(images, sizes, strict=True)
        ]
        options |= {"patch_size": options["encoder_patch_size"], "do_resize": False}
        options["max_num_patches"] = options["max_image_tokens"] * options["downsample_factor"] ** 2
        patches = super()._preprocess(resized, **options)
        ones = [1] * len(images)
        return BatchFeature({**patches, "image_rows": ones, "image_cols": ones, "image_sizes": sizes})
