"""Frames -> MP4 that every browser plays (H.264)."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_QUALITY = "20"  # CRF: text stays sharp at about 20 kB a frame


class VideoWriter:
    """Encodes uint8 (H, W, 3) RGB frames, all of one size; a context manager."""

    def __init__(self, path: str | Path, fps: float):
        self._container = av.open(str(path), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": _QUALITY, "preset": "veryfast"}
        self._started = False

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def add(self, frame: np.ndarray) -> None:
        """frame: odd sides lose their last row or column, which the pixel format cannot hold."""
        height, width = (side - side % 2 for side in frame.shape[:2])
        if not self._started:
            self._stream.height, self._stream.width = height, width
            self._started = True
        video_frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
        self._container.mux(self._stream.encode(video_frame))

    def close(self) -> None:
        if self._started:
            self._container.mux(self._stream.encode())
        self._container.close()
