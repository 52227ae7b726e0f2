"""Procedural surfaces, so that no picture file has to be shipped. All uint8 (H, W, 3), made once."""

from functools import cache

import numpy as np

SIZE = 512


def _smooth_noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """float (SIZE, SIZE) in 0..1: random values on a coarse periodic grid, blended by cosines."""
    grid = rng.random((rows, columns))
    return _stretch(_stretch(grid, 0), 1)


def _stretch(grid: np.ndarray, axis: int) -> np.ndarray:
    position = np.arange(SIZE) / SIZE * grid.shape[axis]
    left = position.astype(int)
    weight = 0.5 - 0.5 * np.cos(np.pi * (position - left))
    weight = weight.reshape([-1 if index == axis else 1 for index in range(2)])
    after = np.take(grid, (left + 1) % grid.shape[axis], axis)
    return np.take(grid, left, axis) * (1 - weight) + after * weight


@cache
def make_wood(seed: int, planks: int) -> np.ndarray:
    """Grain along the picture's rows in `planks` boards (1: a plain veneer), mid brown; tint it."""
    rng = np.random.default_rng(seed)
    bend = 40 * _smooth_noise(rng, 6, 3)
    across = np.arange(SIZE)[:, None] + bend
    rings = 0.5 + 0.5 * np.sin(across * 2 * np.pi / SIZE * 24 + 3 * _smooth_noise(rng, 24, 4))
    fibres = _smooth_noise(rng, 256, 12)
    blotches = _smooth_noise(rng, 8, 5)
    value = 0.74 + 0.10 * rings + 0.16 * (fibres - 0.5) + 0.14 * (blotches - 0.5)
    board = np.arange(SIZE) * planks // SIZE
    value *= (0.92 + 0.16 * rng.random(planks))[board][:, None]
    if planks > 1:
        seam = np.arange(SIZE) * planks % SIZE < 2 * planks
        value[seam] *= 0.55
    colour = np.array([224, 178, 132]) * value[..., None] ** np.array([1.0, 1.15, 1.3])
    return np.clip(colour, 0, 255).astype(np.uint8)


@cache
def make_plaster(seed: int) -> np.ndarray:
    """A painted wall: nearly white, faintly uneven; tint it."""
    rng = np.random.default_rng(seed)
    value = 0.90 + 0.05 * _smooth_noise(rng, 5, 5) + 0.03 * _smooth_noise(rng, 128, 128)
    return np.repeat((255 * value).astype(np.uint8)[..., None], 3, axis=2)


@cache
def make_label(seed: int) -> np.ndarray:
    """The paper around a tin: bands and blocks of colour."""
    rng = np.random.default_rng(seed)
    paint = np.array([[196, 40, 32], [238, 232, 214], [44, 110, 58], [232, 178, 48], [40, 62, 120]])
    rows = rng.integers(0, len(paint), 8).repeat(SIZE // 8)
    picture = paint[rows][:, None].repeat(SIZE, axis=1)
    for _ in range(14):
        row, column = rng.integers(0, SIZE, 2)
        picture[row : row + 60, column : column + 90] = paint[rng.integers(len(paint))]
    return picture.astype(np.uint8)
