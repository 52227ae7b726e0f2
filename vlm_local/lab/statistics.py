"""Chance over episodes: which episodes a bootstrap draws, and 95 % intervals of what they give."""

from collections.abc import Iterator

import numpy as np

NUM_RESAMPLES = 2000
_CHUNK = 50  # resamples at a time: bounds memory for data sets of many episodes
_EDGES = (0.025, 0.975)


def draw_weights(num_episodes: int, seed: int) -> Iterator[np.ndarray]:
    """How often each episode is drawn when as many are drawn as there are, with replacement.

    Yields float64 (resamples, E) until there are NUM_RESAMPLES; the same for the same seed.
    """
    random = np.random.default_rng(seed)
    offsets = num_episodes * np.arange(_CHUNK)[:, None]
    for _ in range(NUM_RESAMPLES // _CHUNK):
        picks = random.integers(0, num_episodes, (_CHUNK, num_episodes)) + offsets
        counts = np.bincount(picks.ravel(), minlength=_CHUNK * num_episodes)
        yield counts.reshape(_CHUNK, num_episodes).astype(np.float64)


def find_interval(values: np.ndarray) -> list[float] | None:
    """95 % percentile interval of resampled scores; NaN ones are left out, None where all are."""
    values = values[np.isfinite(values)]
    return np.quantile(values, _EDGES).tolist() if len(values) else None
