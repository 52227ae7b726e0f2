"""What a robot's steps say of its camera and its name. It is only told: no step is refused for it."""

import logging
import zlib

import numpy as np

logger = logging.getLogger(__name__)

FROZEN_AFTER = 5  # steps; a simulated arm that is blocked looks the same for some, too
SHARED_AFTER = 5  # requests; a person may change an instruction twice in a row


class CameraWatch:
    """Whether one robot's camera still sees. A real picture is never the same twice, least of all of a moving arm."""

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


class NameWatch:
    """Whether one arm alone uses a robot's name. Of two that call in turn, each request begins an episode."""

    def __init__(self, robot: str):
        self._robot = robot
        self._num_short = 0

    def note(self, begun_by: str | None) -> int:
        """begun_by: why this request began an episode, None where it did not -> how many in a row began one because of
        another instruction or pose, 0 below SHARED_AFTER.
        """
        self._num_short = self._num_short + 1 if begun_by in ("instruction", "jump") else 0
        if self._num_short == SHARED_AFTER:
            logger.warning(
                "robot %s: %d requests in a row each began an episode, by another instruction or pose: do two arms use "
                "this name? Give each its own address, which ends in /s/NAME",
                self._robot,
                SHARED_AFTER,
            )
        return self._num_short if self._num_short >= SHARED_AFTER else 0
