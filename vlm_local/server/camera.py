"""Whether a robot's camera still sees. A real picture is never twice the same, least of all of an arm that moves."""

import logging
import zlib

import numpy as np

logger = logging.getLogger(__name__)

FROZEN_AFTER = 5  # steps; a simulated arm that is blocked looks the same for some, too


class Camera:
    """Of one robot. It only tells: an arm may stand still for reasons of its own."""

    def __init__(self, robot: str):
        self._robot = robot
        self._picture: int | None = None
        self._should_differ = False
        self._num_same = 0

    def see(self, picture: np.ndarray) -> int:
        """uint8 (H, W, 3) -> for how many steps that should have moved the arm it has been the same, 0 below
        FROZEN_AFTER.
        """
        checksum = zlib.crc32(picture.tobytes())
        if checksum != self._picture:
            self._picture, self._num_same = checksum, 0
        elif self._should_differ:
            self._num_same += 1
            if self._num_same == FROZEN_AFTER:
                logger.warning(
                    "robot %s has sent the same picture for %d steps that should have moved it: does its camera run?",
                    self._robot,
                    FROZEN_AFTER,
                )
        return self._num_same if self._num_same >= FROZEN_AFTER else 0

    def tell(self, action: np.ndarray) -> None:
        """action: 7 numbers that were answered to the last picture."""
        self._should_differ = bool(np.any(action[:6]))
