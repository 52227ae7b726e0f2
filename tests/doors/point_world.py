"""A point that moves as it is told: an environment for vla-eval's runner and one for inspect-robots."""

import numpy as np

GOAL_M = 0.05  # upwards


def draw(place: np.ndarray) -> np.ndarray:
    image = np.full((128, 128, 3), 90, np.uint8)
    row, column = (np.clip(64 + 200 * place[[2, 1]] * (-1, -1), 0, 120)).astype(int)
    image[row : row + 8, column : column + 8] = (200, 30, 30)
    return image
