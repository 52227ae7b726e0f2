"""The point as a benchmark of vla-eval."""

import numpy as np
from point_world import GOAL_M, draw
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import DimSpec


class PointBenchmark(StepBenchmark):
    """Solved when the point is GOAL_M above where it began."""

    def get_tasks(self):
        return [{"name": "go up", "suite": "point"}]

    def reset(self, task):
        self.place = np.zeros(3)
        return draw(self.place)

    def step(self, action):
        actions = np.asarray(action["actions"])
        assert actions.shape == (7,) and actions.dtype == np.float32
        self.place = self.place + actions[:3]
        return StepResult(draw(self.place), 0.0, bool(self.place[2] >= GOAL_M), {})

    def make_obs(self, raw_obs, task):
        return {"images": {"agentview": raw_obs}, "task_description": task["name"], "states": np.zeros(8)}

    def get_step_result(self, step_result):
        return {"success": step_result.done}

    def get_action_spec(self):
        return {"position": DimSpec("position", 3, "delta_xyz")}

    def get_observation_spec(self):
        return {"image": DimSpec("image", 0, "rgb_hwc_uint8")}
