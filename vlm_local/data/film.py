"""A recorded episode as a film: each frame with what was asked, said and done drawn below it."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_local.data.runs import choose_action
from vlm_local.data.video import load_frame

CONTROL_HZ = 5
_QUALITY = "20"  # CRF: text stays sharp at about 20 kB a frame
_WIDTH, _PANEL, _MARGIN = 640, 148, 20
_INK, _MUTED, _TRACK, _ACCENT, _BAD = (237, 240, 245), (143, 152, 168), (46, 52, 62), (107, 160, 255), (255, 123, 116)
_GROUND = (21, 24, 30)
_OUTCOMES = {"success": (76, 199, 154), "lost": _BAD, "late": _BAD, "faulted": (231, 176, 79)}
_TOLD = {"late": "not done in time", "faulted": "no answer"}
_AXES = ("x", "y", "z", "roll", "pitch", "yaw")
_FULL = (0.0125,) * 3 + (0.125,) * 3  # a bar's full length: one phrase's step
_GIF_PX = 320  # wide
_COLOURS, _SAMPLED = 192, 24  # of a GIF: its palette's size, and the pages that it is made from
_LEFTWARD = ("y", "yaw")  # plus is left and counterclockwise, and is drawn to the left


def write_film(path: str | Path, steps: Iterable[tuple[np.ndarray, Mapping[str, Any]]]) -> int:
    """Write an MP4 (H.264) of (image uint8 (H, W, 3), line of steps.jsonl); returns the number of frames.

    All frames are of one size. Odd sides lose their last row or column, which the pixel format cannot hold.
    """
    count = 0
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=CONTROL_HZ)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": _QUALITY, "preset": "veryfast"}
        try:
            for image, line in steps:
                page = draw_step(image, line)
                height, width = (side - side % 2 for side in page.shape[:2])
                if not count:
                    stream.height, stream.width = height, width
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(page[:height, :width]), format="rgb24")
                container.mux(stream.encode(frame))
                count += 1
        finally:
            if count:
                container.mux(stream.encode())
    return count


def write_gif(path: str | Path, steps: Iterable[tuple[np.ndarray, Mapping[str, Any]]]) -> None:
    """The same as a GIF that runs for ever, and smaller; for pages that play no MP4."""
    pages = [Image.fromarray(draw_step(image, line)) for image, line in steps]
    small = [page.resize((_GIF_PX, page.height * _GIF_PX // page.width), Image.Resampling.LANCZOS) for page in pages]
    sampled = [*small[:: len(small) // _SAMPLED + 1], small[-1]]
    montage = Image.fromarray(np.concatenate([np.asarray(page) for page in sampled]))
    # One palette for all pages: with one for each, still surfaces would flicker. Its colours lie far apart; those that
    # cover most would leave none for a block or a word.
    palette = montage.quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=1)
    coloured = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in small]
    coloured[0].save(path, save_all=True, append_images=coloured[1:], duration=1000 // CONTROL_HZ, loop=0)


def read_picture(path: Path, number: int) -> np.ndarray:
    """A film's frame, counted from 0, without the panel: uint8 (H, 640, 3). Raises DataError."""
    return load_frame(path, number / CONTROL_HZ, CONTROL_HZ)[:-_PANEL]


def draw_step(image: np.ndarray, line: Mapping[str, Any]) -> np.ndarray:
    """The frame, 640 wide, above a panel with instruction, phrase and action -> uint8 (H', 640, 3).

    line: of steps.jsonl; after the last step without phrase, but with `outcome`.
    """
    height = round(image.shape[0] * _WIDTH / image.shape[1])
    page = Image.new("RGB", (_WIDTH, height + _PANEL), _GROUND)
    page.paste(Image.fromarray(image).resize((_WIDTH, height), Image.Resampling.LANCZOS), (0, 0))
    draw = ImageDraw.Draw(page)
    count = f"step {line.get('step', '')}"
    draw.text((_WIDTH - _MARGIN, height + 12), count, _MUTED, _font(15), anchor="ra")
    room = _WIDTH - 3 * _MARGIN - draw.textlength(count, _font(15))
    _write(draw, (_MARGIN, height + 12), str(line.get("instruction") or ""), 15, room, _MUTED)
    fault, outcome = line.get("fault"), line.get("outcome")
    said = _TOLD.get(outcome or "", outcome) or (f"standing still: {fault}" if fault else line.get("phrase") or "")
    colour = _BAD if fault else _OUTCOMES.get(outcome or "", _INK)
    _write(draw, (_MARGIN, height + 36), said, 30, _WIDTH - 2 * _MARGIN, colour)
    if action := choose_action(line):
        _draw_action(draw, height + 88, action)
    return np.asarray(page)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, room: float, colour: tuple) -> None:
    """One line of text: smaller where it is long, cut where it is too long for that."""
    text = text[:_WIDTH]  # a letter is wider than a pixel; without this, cutting a long text takes seconds a frame
    while size > 12 and draw.textlength(text, _font(size)) > room:
        size -= 1
    while text and draw.textlength(text, _font(size)) > room:
        text = text.removesuffix("…")[:-1] + "…" if len(text) > 2 else ""
    draw.text(at, text, colour, _font(size))


def _draw_action(draw: ImageDraw.ImageDraw, top: int, action: list[float]) -> None:
    """A column an axis: its name, a bar from the middle, its number; last the gripper in words."""
    column = (_WIDTH - 2 * _MARGIN) / 7
    for at, (name, value, full) in enumerate(zip(_AXES, action[:6], _FULL, strict=True)):
        left = _MARGIN + at * column
        right = left + column - 14
        middle = (left + right) / 2
        draw.text((left, top), name, _MUTED, _font(12))
        draw.text((right, top), f"{value:+.3f}" if value else "0", _INK if value else _MUTED, _font(12), anchor="ra")
        draw.rectangle((left, top + 24, right, top + 32), _TRACK)
        side = -1 if name in _LEFTWARD else 1
        tip = middle + side * float(np.clip(value / full, -1, 1)) * (right - left) / 2
        draw.rectangle((min(middle, tip), top + 24, max(middle, tip), top + 32), _ACCENT)
    left = _MARGIN + 6 * column
    draw.text((left, top), "gripper", _MUTED, _font(12))
    draw.text((left, top + 19), "open" if action[6] >= 0.5 else "closed", _INK, _font(15))


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
