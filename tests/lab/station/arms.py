"""The arm of a station after its reset."""

from vlm_local.lab.station.arm import StationArm
from vlm_local.sim.environment import SimEnv


def start_arm(task: str, has_box: bool = True) -> tuple[SimEnv, StationArm]:
    env = SimEnv(task, image_size=None)
    env.reset(seed=0)
    arm = StationArm(env, has_box)
    arm.reset()
    return env, arm
