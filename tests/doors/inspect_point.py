"""The point as an embodiment of inspect-robots, played by its policy `vlm-local`: inspect_point.py SERVER_URL LOGS"""

import json
import sys

import inspect_robots
import numpy as np
from inspect_robots.compat import check_compatibility
from inspect_robots.embodiment import EmbodimentInfo
from inspect_robots.policy import Policy
from inspect_robots.registry import resolve
from inspect_robots.scene import Scene
from inspect_robots.spaces import ActionSemantics, Box, CameraSpec, ObservationSpace
from inspect_robots.task import Task
from inspect_robots.types import Observation, StepResult
from point_world import GOAL_M, draw


class Point:
    """Declares itself as inspect-robots-widowx does."""

    info = EmbodimentInfo(
        "point",
        Box((7,), np.r_[[-0.05] * 3, [-0.25] * 3, 0], np.r_[[0.05] * 3, [0.25] * 3, 1],
            ActionSemantics("eef_delta_pose", "none", "continuous", "base")),
        ObservationSpace((CameraSpec("external_cam", 128, 128, 3),), frozenset({"eef_pose"})),
        control_hz=5.0,
        is_simulated=True,
        capabilities=frozenset({"privileged_success", "resettable"}),
    )  # fmt: skip

    def reset(self, scene, *, seed=None):
        self.place = np.zeros(3)
        return self._observe()

    def step(self, action):
        self.place = self.place + action.data[:3]
        done = bool(self.place[2] >= GOAL_M)
        return StepResult(self._observe(), terminated=done, termination_reason="success" if done else None,
                          info={"success": done})  # fmt: skip

    def close(self):
        pass

    def _observe(self):
        pose = np.r_[self.place, 0, 0, 0, 1.0]
        return Observation({"external_cam": draw(self.place)}, {"eef_pose": pose}, "go up")


policy, point = resolve("policy", "vlm-local", server_url=sys.argv[1]), Point()
assert isinstance(policy, Policy)
policy.bind(point.info)
report = check_compatibility(policy, point)
task = Task("up", [Scene("one", "go up")], "success_at_end", max_steps=20)
(log,) = inspect_robots.eval(task, policy, point, log_dir=sys.argv[2], fail_on_error=True)
print(
    json.dumps(
        {"issues": [issue.message for issue in report.issues], "status": log.status, "said": policy.transcript()}
    )
)
