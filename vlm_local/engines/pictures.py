"""Pictures larger than any model here reads are scaled down, before they go to an engine's process. No torch."""

import numpy as np
from PIL import Image

MAX_PIXELS = 1280 * 28 * 28  # 1,280 image tokens on Qwen


def scale_down(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same with at most MAX_PIXELS pixels; a second call changes nothing."""
    height, width = image.shape[:2]
    if height * width <= MAX_PIXELS:
        return image
    scale = (MAX_PIXELS / (height * width)) ** 0.5
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
