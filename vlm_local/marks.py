"""Marks in the picture: what the words of a direction mean, drawn where the gripper is.

project = Projection.from_camera_matrix(embodiment.camera_matrix)
marked, about = draw_marks(image, proprio[:3], "axes", project)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_local.policy import Policy
from vlm_local.types import Decision, Observation

MARKS = ("axes", "gripper")
ARROW_M = 0.08  # length of each arrow in the world, so that it is foreshortened as a movement is
# Word, axis of the base frame, colour. Drawn in this order: forward lies on top.
_ARROWS = (("up", (0, 0, 1), (60, 120, 255)), ("left", (0, 1, 0), (0, 200, 60)), ("forward", (1, 0, 0), (255, 40, 40)))
_YELLOW = (255, 220, 0)
_HEAD = 0.3  # of an arrow's length
_NEAREST_M = 0.01  # what is nearer to the camera's plane than this has no place in the picture


@dataclass(frozen=True, eq=False)
class Projection:
    """matrix: float64 (3, 4), base frame (x, y, z, 1) in m -> pixels (u w, v w, w) of a picture of `size` (width,
    height), u to the right and v down from the corner of the first pixel; w is positive in front of the camera and is
    the depth in m.
    """

    matrix: np.ndarray
    size: tuple[int, int]

    @classmethod
    def from_camera_matrix(cls, content: Mapping[str, Any]) -> "Projection":
        """content: an embodiment's `camera_matrix`."""
        width, height = content["image_size"]
        return cls(np.array(content["matrix"], dtype=np.float64), (width, height))

    def locate(self, points: np.ndarray, width: int, height: int) -> np.ndarray:
        """Points (n, 3) of the base frame -> pixels (n, 2) of a picture of this size, NaN behind the camera."""
        u, v, depth = self.matrix @ np.append(points, np.ones((len(points), 1)), axis=1).T
        scale = np.where(depth > _NEAREST_M, 1 / np.where(depth > _NEAREST_M, depth, 1.0), np.nan)
        return np.stack([u * scale * width / self.size[0], v * scale * height / self.size[1]], axis=1)


def draw_marks(image: np.ndarray, position: np.ndarray, kind: str, projection: Projection) -> tuple[np.ndarray, dict]:
    """The picture with marks, and where they are: "gripper_px" and, of axes, "forward_px", "left_px" and "up_px".

    image: uint8 (H, W, 3) RGB, which stays as it is. position: (3,) m of the fingertips, base frame.
    kind: "axes", three arrows with their words; "gripper", a ring and a line from it down to the height of the base.
    What lies outside the picture is cut off; nothing is drawn behind the camera.
    """
    height, width = image.shape[:2]
    ends = [position + ARROW_M * np.array(axis) for _, axis, _ in _ARROWS]
    foot = np.array([*position[:2], 0.0])
    start, *tips, below = projection.locate(np.array([position, *ends, foot]), width, height)
    names = [f"{word}_px" for word, _, _ in _ARROWS] if kind == "axes" else ["below_px"]
    shown = [start, *(tips if kind == "axes" else [below])]
    about = {"kind": kind}
    if not np.isfinite(shown).all():
        return image, {**about, "not_drawn": "the gripper is behind the camera"}
    about |= {name: np.round(point, 2).tolist() for name, point in zip(["gripper_px", *names], shown, strict=True)}
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    if kind == "axes":
        _draw_axes(draw, start, tips, min(width, height))
    else:
        _draw_gripper(draw, start, below, min(width, height))
    return np.array(picture), about


def _draw_axes(draw: ImageDraw.ImageDraw, start: np.ndarray, tips: list[np.ndarray], side: int) -> None:
    font = ImageFont.load_default(max(9.0, side / 24))
    for (word, _, _), tip in zip(_ARROWS, tips, strict=True):  # below all arrows, so that no tip is covered
        _write(draw, word, start, tip, font)
    for (_, _, colour), tip in zip(_ARROWS, tips, strict=True):
        _draw_arrow(draw, start, tip, colour, max(2, side // 100))


def _draw_arrow(draw: ImageDraw.ImageDraw, start: np.ndarray, tip: np.ndarray, colour, width: int) -> None:
    along = tip - start
    neck = tip - _HEAD * along
    across = 0.5 * _HEAD * np.array([-along[1], along[0]])
    draw.line([*_to_pixel(start), *_to_pixel(neck)], colour, width)
    draw.polygon([_to_pixel(tip), _to_pixel(neck + across), _to_pixel(neck - across)], colour)


def _write(draw: ImageDraw.ImageDraw, word: str, start: np.ndarray, tip: np.ndarray, font) -> None:
    """Beyond the arrow's tip, white on black, which no arrow is."""
    box = np.array(draw.textbbox((0, 0), word, font, anchor="mm"))
    half = (box[2:] - box[:2]) / 2 + 2
    along = (tip - start) / max(float(np.linalg.norm(tip - start)), 1e-9)
    reach = min(half / np.maximum(np.abs(along), 1e-9)) + 3  # from the word's middle to its edge, and a gap
    middle = tip + reach * along
    draw.rectangle([*(middle - half), *(middle + half)], (0, 0, 0))
    draw.text(tuple(middle), word, (255, 255, 255), font, anchor="mm")


def _draw_gripper(draw: ImageDraw.ImageDraw, start: np.ndarray, below: np.ndarray, side: int) -> None:
    radius, width = side / 32, max(2, side // 128)
    draw.line([*_to_pixel(start), *_to_pixel(below)], _YELLOW, width)
    draw.ellipse([*(start - radius), *(start + radius)], outline=_YELLOW, width=width)


def _to_pixel(point: np.ndarray) -> tuple[float, float]:
    """Pillow counts pixels from their middles, a projection from the picture's corner."""
    return float(point[0]) - 0.5, float(point[1]) - 0.5


class MarkedPolicy:
    """Draws into what the inner policy sees; `extra["marks"]` says what. The caller's picture stays as it came."""

    def __init__(self, policy: Policy, kind: str, projection: Projection):
        self._policy = policy
        self._kind = kind
        self._projection = projection

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._policy.metadata

    def reset(self, seed: int) -> None:
        self._policy.reset(seed)

    def act(self, observation: Observation) -> Decision:
        if observation.proprio is None:
            about = {"kind": self._kind, "not_drawn": "the position of the gripper is not measured"}
        else:
            marked, about = draw_marks(observation.image, observation.proprio[:3], self._kind, self._projection)
            observation = replace(observation, image=marked, unmarked=observation.image)
        decision = self._policy.act(observation)
        return replace(decision, extra={**decision.extra, "marks": about})
