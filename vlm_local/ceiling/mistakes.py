"""How an answer differs from the oracle's: slips at a given rate, or draws from a confusion.

Chance is common to all settings: episode `seed` has one table of uniform numbers, a step and axis each, so
what slips at 2 % slips at 5 % in that step, too, and settings can be compared episode by episode.
"""

import hashlib
import zlib
from typing import Protocol

import numpy as np

from vlm_local.actions import STEP_M
from vlm_local.ceiling.settings import ALL, OPPOSITE, Setting
from vlm_local.sim.world import World
from vlm_local.types import AXES, Primitive

_STREAM = zlib.crc32(b"ceiling")  # apart from the draws of scenes


class Mistakes(Protocol):
    """Of one episode."""

    def alter(self, primitive: Primitive, step: int, world: World) -> Primitive:
        """What is said instead of the oracle's `primitive` at control step `step`."""


class Slips:
    """Each axis slips in `setting.rate` of the steps in which it should move."""

    def __init__(self, setting: Setting, seed: int, max_steps: int):
        self._columns = range(len(AXES)) if setting.axis == ALL else (AXES.index(setting.axis),)
        self._factor = -1 if setting.kind == OPPOSITE else 0
        self._slips = draw_uniforms(seed, max_steps) < setting.rate

    def alter(self, primitive: Primitive, step: int, world: World) -> Primitive:
        signs = list(primitive)
        for column in self._columns:
            if self._slips[step, column]:
                signs[column] *= self._factor
        return Primitive(*signs)


class Confused:
    """Each axis says what it says on average when the oracle says the same, drawn from its row.

    counts: (6, 3, 3) [axis, oracle's sign, said sign] for -, 0, +; a row without counts is always right.
    persistent: a draw belongs to the place (tips to STEP_M, gripper open or not, the oracle's phrase) and
    not to the step, so the same place brings the same mistake until the episode ends.
    """

    def __init__(self, counts: np.ndarray, persistent: bool, seed: int, max_steps: int):
        known = np.where(counts.sum(axis=2, keepdims=True) > 0, counts, np.eye(3))
        self._edges = np.cumsum(known, axis=2) / known.sum(axis=2, keepdims=True)
        self._persistent, self._seed = persistent, seed
        self._uniforms = draw_uniforms(seed, max_steps)

    def alter(self, primitive: Primitive, step: int, world: World) -> Primitive:
        uniforms = self._draw_for_place(primitive, world) if self._persistent else self._uniforms[step]
        edges = self._edges[np.arange(len(AXES)), np.array(primitive) + 1]
        return Primitive(*((uniforms[:, None] >= edges[:, :2]).sum(axis=1) - 1).tolist())

    def _draw_for_place(self, primitive: Primitive, world: World) -> np.ndarray:
        """(6,) in [0, 1), the same wherever this is the same."""
        place = (self._seed, *np.round(world.tips / STEP_M).astype(int).tolist(), world.opening > 0.5, *primitive)
        digest = hashlib.blake2b(repr(place).encode(), digest_size=4 * len(AXES)).digest()
        return np.frombuffer(digest, "<u4") / 2**32


def draw_uniforms(seed: int, max_steps: int) -> np.ndarray:
    """(max_steps, 6) in [0, 1); the first rows do not depend on max_steps."""
    return np.random.default_rng([seed, _STREAM]).random((max_steps, len(AXES)))
