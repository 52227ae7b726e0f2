"""Single frames of a video file, by time."""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from vlm_local.data.images import check_image
from vlm_local.errors import DataError

_SEEK_AHEAD_S = 4.0  # decoding this far is cheaper than seeking to a key frame


class VideoFrames:
    """Frames of one episode in a video. Opened at the first frame; fast when read in order."""

    def __init__(self, path: Path, start_s: float, fps: float):
        """start_s: where the episode begins in the video."""
        self._path, self._start_s, self._fps = path, start_s, fps
        self._container = None
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._next: av.VideoFrame | None = None  # decoded, not before the frame asked for last

    def load(self, time_s: float) -> np.ndarray:
        """Frame at this time of the episode, uint8 (H, W, 3). Raises DataError where there is none."""
        wanted, half = self._start_s + time_s, 0.5 / self._fps
        try:
            if self._next is None or not -half <= wanted - self._next.time <= _SEEK_AHEAD_S:
                self._seek(wanted - half)
            while self._next is not None and self._next.time < wanted - half:
                self._next = next(self._frames, None)
        except (av.FFmpegError, OSError) as error:
            raise DataError(f"{self._path}: cannot be decoded at {wanted:.3f} s ({error})") from None
        if self._next is None or self._next.time > wanted + half:
            raise DataError(
                f"{self._path}: there is no frame at {wanted:.3f} s; the video is too short or lacks frames"
            )
        return check_image(self._next.to_ndarray(format="rgb24"), str(self._path))

    def _seek(self, time_s: float) -> None:
        """To the key frame at or before this time."""
        if self._container is None:
            container = av.open(str(self._path))
            if not container.streams.video:
                raise DataError(f"{self._path} has no video in it")
            self._container = container
        stream = self._container.streams.video[0]
        self._container.seek(int(max(time_s, 0) / stream.time_base), stream=stream)
        self._frames = self._container.decode(stream)
        self._next = next(self._frames, None)
