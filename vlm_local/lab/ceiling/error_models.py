"""Error models: how an answer differs from the oracle's, at a given rate or as a confusion matrix says.

All settings share their random numbers: episode `seed` has one table of uniform numbers, one for each step and axis,
so a step that is wrong at 2 % is also wrong at 5 %, and settings can be compared episode by episode.
"""

import hashlib
import zlib
from typing import Protocol

import numpy as np

from vlm_local.actions import STEP_M
from vlm_local.lab.ceiling.settings import ALL, OPPOSITE, Setting
from vlm_local.sim.world import World
from vlm_local.types import AXES, Primitive

BY_STEP, TOGETHER, BY_PLACE = DRAWS = ("step", "together", "place")
_COLUMNS = np.arange(len(AXES))
_STREAM = zlib.crc32(b"ceiling")  # keeps these draws apart from those of scenes


class ErrorModel(Protocol):
    """The errors of one episode."""

    def alter(self, primitive: Primitive, step: int, world: World) -> Primitive:
        """What is said instead of the oracle's `primitive` at control step `step`."""
        ...


class AxisErrors:
    """Each axis is wrong in `setting.rate` of the steps in which it should move, as `setting.kind` says."""

    def __init__(self, setting: Setting, seed: int, max_steps: int):
        self._columns = range(len(AXES)) if setting.axis == ALL else (AXES.index(setting.axis),)
        self._factor = -1 if setting.kind == OPPOSITE else 0
        self._wrong = draw_uniforms(seed, max_steps) < setting.rate

    def alter(self, primitive: Primitive, step: int, world: World) -> Primitive:
        signs = list(primitive)
        for column in self._columns:
            if self._wrong[step, column]:
                signs[column] *= self._factor
        return Primitive(*signs)


class ConfusionErrors:
    """Each axis' sign is drawn from the row of its confusion matrix for the oracle's sign.

    counts: int (6, 3, 3) [axis, oracle's sign, said sign] for -, 0, +; a row without counts is always right.
    draw: BY_STEP draws each axis by itself in every step. TOGETHER draws one number for all axes that decides whether
    they are wrong, so they are wrong in the same steps. BY_PLACE is BY_STEP with one draw for a place (tips to STEP_M,
    gripper open or not, the oracle's phrase), so the error is the same whenever the arm is there.
    """

    def __init__(self, counts: np.ndarray, draw: str, seed: int, max_steps: int):
        known = np.where(counts.sum(axis=2, keepdims=True) > 0, counts, np.eye(3))
        self._shares = known / known.sum(axis=2, keepdims=True)
        self._draw, self._seed = draw, seed
        self._uniforms = draw_uniforms(seed, max_steps)
        self._together = np.random.default_rng([seed, _STREAM, 1]).random(max_steps)

    def alter(self, primitive: Primitive, step: int, world: World) -> Primitive:
        right = np.array(primitive) + 1
        shares = self._shares[_COLUMNS, right]  # (6, 3)
        if self._draw == TOGETHER:
            said = self._say_together(right, shares, step)
        else:
            said = _pick(
                shares, self._uniforms[step] if self._draw == BY_STEP else self._draw_for_place(primitive, world)
            )
        return Primitive(*(said - 1).tolist())

    def _say_together(self, right: np.ndarray, shares: np.ndarray, step: int) -> np.ndarray:
        wrong = shares.copy()
        wrong[_COLUMNS, right] = 0
        total = np.maximum(wrong.sum(axis=1, keepdims=True), np.finfo(float).tiny)
        is_wrong = self._together[step] >= shares[_COLUMNS, right]
        return np.where(is_wrong, _pick(wrong / total, self._uniforms[step]), right)

    def _draw_for_place(self, primitive: Primitive, world: World) -> np.ndarray:
        """(6,) in [0, 1), the same wherever this is the same."""
        place = (self._seed, *np.round(world.tips / STEP_M).astype(int).tolist(), world.opening > 0.5, *primitive)
        digest = hashlib.blake2b(repr(place).encode(), digest_size=4 * len(AXES)).digest()
        return np.frombuffer(digest, "<u4") / 2**32


def _pick(shares: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """shares: (6, 3) adding up to 1; uniforms: (6,) -> index 0..2 of each axis."""
    return (uniforms[:, None] >= np.cumsum(shares, axis=1)[:, :2]).sum(axis=1)


def draw_uniforms(seed: int, max_steps: int) -> np.ndarray:
    """(max_steps, 6) in [0, 1); the first rows do not depend on max_steps."""
    return np.random.default_rng([seed, _STREAM]).random((max_steps, len(AXES)))
