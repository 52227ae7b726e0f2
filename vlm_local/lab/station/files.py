"""The files that AutoEval's logger leaves of a job: eval_data/<id>/{metadata.json, traj_<i>.pkl}.

As there, a frame and a state stand beside the action that led to them; the first observation is not kept.
"""

import pickle
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.files import write_json

_MODULE = "robot_eval_logger.typing.traj_data"
_UNUSED = ("episode_length", "max_joint_efforts", "need_human_intervention", "num_eval_retries")


def write_metadata(folder: Path, eval_id: str) -> None:
    fields = {
        "eval_id": eval_id,
        "location": "simulator",
        "robot_name": "widowx_drawer",  # also at the sink, as AutoEval writes it
        "robot_type": "widowx",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "evaluator_name": "vlm-local station",
    }
    write_json(folder / "metadata.json", fields)


def write_trajectory(path: Path, instruction: str, steps: list[dict[str, Any]], success: bool, seconds: float) -> None:
    """steps: of each the answered "action" (7,), and "image" and "state" (8,) after it."""
    fields = {
        "language_command": instruction,
        "obs": {"image_primary": [step["image"] for step in steps]},
        "action": [np.asarray(step["action"]) for step in steps],
        "proprio": [np.asarray(step["state"], np.float32) for step in steps],
        "success": success,
        "eval_rollout_steps": len(steps) - 1,
        "eval_rollout_time": seconds,
        "exceeded_joint_efforts": False,
        "experienced_motor_failure": False,
        "pre_rollout_checks_failed": False,
        "post_rollout_checks_failed": False,
        **dict.fromkeys(_UNUSED),
    }
    path.write_bytes(_pickle_as_logger(fields))


def _pickle_as_logger(fields: dict[str, Any]) -> bytes:
    """An object of the logger's class, named and not imported: pickle wants its module only while it writes."""
    parts = _MODULE.split(".")
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    before = {name: sys.modules.get(name) for name in names}
    kind = type("TrajData", (), {"__module__": _MODULE})
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        sys.modules[_MODULE].TrajData = kind
        trajectory = kind()
        trajectory.__dict__.update(fields)
        return pickle.dumps(trajectory, 4)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
