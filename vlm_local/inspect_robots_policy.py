"""The policy `vlm-local` of inspect-robots: asks a running server of ours for each action.

inspect-robots imports this module by its entry point. It needs numpy and nothing else of ours but the client.
"""

# inspect-robots installs itself beside this package; it is no dependency of ours.
# pyright: reportMissingImports=false

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np
from inspect_robots.policy import PolicyConfig, PolicyInfo
from inspect_robots.spaces import ActionSemantics, Box
from inspect_robots.types import Action, ActionChunk, Observation

from vlm_local.client import PolicyClient

CONTROL_HZ = 5.0
_LABELS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_LIMIT = np.array([0.05, 0.05, 0.05, 0.25, 0.25, 0.25, 1.0])  # m and rad a step: what `serve` lets through
_STATE_KEYS = ("eef_pose", "proprio")


class VLMLocalPolicy:
    """Deltas in metres and radians in the robot's base frame, gripper 1 for open.

    A failure of the server ends the trial as an error, never as a failure of the task.
    """

    remedy = "start `serve`, or give its address with -P server_url=http://HOST:PORT"

    def __init__(self, server_url: str = "http://127.0.0.1:8000", camera: str = "", steps: int = 1):
        """server_url: also with /t/TOKEN or /s/ROBOT. camera: whose picture is sent; "" for the only one there is.

        steps: control steps for which an answer is played.
        """
        self.server_url = server_url
        self._client = PolicyClient(server_url)
        self._camera = camera
        self._steps = int(steps)
        self._instruction = ""
        self._said: list[dict[str, Any]] = []
        self.config = PolicyConfig(action_horizon=self._steps, replan_interval=self._steps)
        self.info = _describe("euler_xyz")

    def bind(self, embodiment_info: Any) -> None:
        """Adopt the embodiment's name for rotations: a delta about one axis is the same in all of them."""
        semantics = embodiment_info.action_space.semantics
        if semantics is not None:
            self.info = _describe(semantics.rotation_repr)

    def reset(self, scene: Any) -> None:
        self._instruction = str(scene.instruction)
        self._said = []
        self._client.reset()

    def act(self, observation: Observation) -> ActionChunk:
        """Raises PolicyError where the server refuses or fails, ValueError where no camera can be chosen."""
        began = perf_counter()
        image = self._choose_image(observation.images)
        instruction = observation.instruction or self._instruction
        answer = self._client.act(image, instruction, _find_proprio(observation.state))
        told = {name: answer.get(name) for name in ("phrase", "probability", "fault")}
        self._said.append(told)
        actions = [Action(np.array(answer["action"], np.float64)) for _ in range(self._steps)]
        return ActionChunk(actions, CONTROL_HZ, perf_counter() - began, told)

    def transcript(self) -> list[dict[str, Any]]:
        """The phrases of this trial, and how probable they were."""
        return [dict(told) for told in self._said]

    def _choose_image(self, images: Mapping[str, np.ndarray]) -> np.ndarray:
        if self._camera in images:
            return images[self._camera]
        if len(images) == 1 and not self._camera:
            return next(iter(images.values()))
        raise ValueError(f"choose a camera with -P camera=NAME; there are {', '.join(sorted(images)) or 'none'}")


def _describe(rotation: Any) -> PolicyInfo:
    semantics = ActionSemantics("eef_delta_pose", rotation, "continuous", "base", _LABELS)
    return PolicyInfo("vlm-local", Box((7,), np.append(-_LIMIT[:6], 0.0), _LIMIT, semantics), control_hz=CONTROL_HZ)


def _find_proprio(state: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """[x, y, z, roll, pitch, yaw, gripper 0..1], where the embodiment tells it."""
    found = next((state[key] for key in _STATE_KEYS if key in state), None)
    return None if found is None or np.shape(found) != (7,) else np.asarray(found, np.float64)
