"""Single frames of a video file, by time."""

from collections.abc import Iterator
from pathlib import Path

import av
import av.error
import numpy as np

from vlm_local.data.cache import keep_last
from vlm_local.data.images import MAX_SIDE, check_image
from vlm_local.errors import DataError

_SEEK_AHEAD_S = 4.0  # decoding this far is cheaper than seeking to a key frame


def load_frame(path: Path, time_s: float, fps: float) -> np.ndarray:
    """The frame nearest to this time of a video, uint8 (H, W, 3). Fast when frames are read in order.

    fps: of the data set; raises DataError where no frame is within half a step.
    """
    try:
        frame = _open_video(path).find_nearest(time_s)
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path}: cannot be decoded at {time_s:.3f} s ({error})") from None
    if frame is None or abs(frame.time - time_s) > 0.5 / fps:
        raise DataError(f"{path}: there is no frame at {time_s:.3f} s; the video is too short or lacks frames")
    return check_image(frame.to_ndarray(format="rgb24"), str(path))


class _Video:
    """An open video. `before` and `after` are neighbours in it, decoded last; None where there is none."""

    def __init__(self, path: Path):
        self._container = av.open(str(path))
        if not self._container.streams.video:
            raise DataError(f"{path} has no video in it")
        self._stream = self._container.streams.video[0]
        if max(self._stream.width, self._stream.height) > MAX_SIDE:
            raise DataError(f"{path}: frames of at most {MAX_SIDE} pixels a side were expected")
        pixels = self._stream.pix_fmt or ""
        if pixels.startswith("gray"):
            raise DataError(f"{path}: a video in colour was expected, this one is {pixels}, as depth maps are")
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._before: av.VideoFrame | None = None
        self._after: av.VideoFrame | None = None

    def close(self) -> None:
        self._container.close()

    def find_nearest(self, time_s: float) -> av.VideoFrame | None:
        """None for a video without frames."""
        if not self._is_near(time_s):
            self._seek(time_s)
        while self._after is not None and self._after.time < time_s:
            self._before, self._after = self._after, None  # a decoder that fails leaves a place to seek from
            self._after = next(self._frames, None)
        around = [frame for frame in (self._before, self._after) if frame is not None]
        return min(around, key=lambda frame: abs(frame.time - time_s), default=None)

    def _is_near(self, time_s: float) -> bool:
        """Whether decoding on from here comes to this time soon."""
        if self._after is None or time_s > self._after.time + _SEEK_AHEAD_S:
            return False
        return (self._before or self._after).time <= time_s

    def _seek(self, time_s: float) -> None:
        """To the key frame at or before this time."""
        self._container.seek(int(max(time_s, 0) / (self._stream.time_base or 1)), stream=self._stream)
        self._frames = (frame for frame in self._container.decode(self._stream) if frame.time is not None)
        self._before, self._after = None, next(self._frames, None)


_open_video = keep_last(_Video)
