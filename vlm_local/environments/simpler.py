"""SIMPLER's four WidowX tasks (Li et al., 2024) as TaskEnvironments: `.venv/bin/pip install -e '.[simpler]'`.

ManiSkill3 plays them, with SIMPLER's scenes, robot and photographs behind them. Its action is ours: metres and radians
about the axes of the robot's base, added to a target that the hand follows. An episode is as long as in SIMPLER's own
evaluation, and what counts is how it ends. Seed s plays the task's arrangement s, modulo their number.
"""

import warnings
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm_local.actions import StepTable, check_action, find_first_command
from vlm_local.embodiments.rotations import DOWN, matrix_to_euler
from vlm_local.environments import SIMPLER, Outcome, Suite, import_package
from vlm_local.environments.simpler_oracle import Body, PutOracle, Scene
from vlm_local.errors import ConfigError
from vlm_local.types import Observation, Primitive


class _Task(NamedTuple):
    """name: ManiSkill3's. steps: control steps of an episode. other: an instruction that asks for something else."""

    name: str
    steps: int
    other: str


_TASKS = {  # by SIMPLER's names
    "widowx_carrot_on_plate": _Task("PutCarrotOnPlateInScene-v1", 60, "put the spoon on the towel"),
    "widowx_put_eggplant_in_basket": _Task("PutEggplantInBasketScene-v1", 120, "put carrot on plate"),
    "widowx_spoon_on_towel": _Task("PutSpoonOnTableClothInScene-v1", 60, "put carrot on plate"),
    "widowx_stack_cube": _Task("StackGreenCubeOnYellowCubeBakedTexInScene-v1", 60, "put the spoon on the towel"),
}
_STAGES = ("grasped", "placed")  # at any time
_ASSETS = ("bridge_v2_real2sim", "widowx250s")
_SHUT_M, _OPEN_M = 0.015, 0.037  # where a finger stands
_CAMERA = "3rd_view_camera"
_PHRASE = StepTable()
_SIZES = np.array([_PHRASE.x_m, _PHRASE.y_m, _PHRASE.z_m, _PHRASE.yaw_rad])


class SimplerEnv:
    """One task. image_size: pixels a side, None draws nothing."""

    def __init__(self, task: str, image_size: int | None = None):
        self._image_size = image_size
        self._task = _TASKS[task]
        self._env = _make(self._task.name)
        self._oracle = PutOracle()
        self.configure()

    @property
    def observation(self) -> Observation:
        return Observation(self._image, self._instruction, self.proprio, self._step)

    @property
    def wrong_instruction(self) -> str:
        """Of another task; what it names is not in the scene."""
        return self._task.other

    @property
    def proprio(self) -> np.ndarray:
        """float64 (7,) as types.Observation.proprio: the hand's place, angles from pointing down, the opening."""
        hand = self._locate(self._robot.links_map["ee_gripper_link"].pose)
        finger = float(self._robot.get_qpos()[0, -2:].mean())
        opening = np.clip((finger - _SHUT_M) / (_OPEN_M - _SHUT_M), 0.0, 1.0)
        return np.array([*hand[:3, 3], *matrix_to_euler(hand[:3, :3] @ DOWN.T), opening])

    @property
    def oracle_action(self) -> np.ndarray:
        """float64 (7,) as `step` takes it: what the oracle would do if it could say any number up to a phrase's."""
        missing, is_shut = self._oracle.aim(self._build_scene())
        x, y, z, yaw = np.clip(missing, -_SIZES, _SIZES)
        return np.array([x, y, z, 0.0, 0.0, yaw, 0.0 if is_shut else 1.0])

    def configure(self, scale: float = 1.0, hold: int = 1) -> None:
        """For the episodes that follow. scale: size of the oracle's phrases, in those of the suite's table.

        hold: control steps for which its caller keeps a phrase.
        """
        self._phrase = scale * hold

    def reset(self, seed: int) -> None:
        number = seed % (len(self._env.xyz_configs) * len(self._env.quat_configs))
        # Built anew: else the things settle while the arm stands where the last episode left it.
        self._env.reset(seed=0, options={"episode_id": number, "reconfigure": True})
        self._instruction = self._env.get_language_instruction()[0]
        self._step, self._stage = 0, 0
        self._command = find_first_command(self.proprio[6])
        self._info = self._env.get_info()
        self._oracle.reset(self._phrase * _PHRASE.x_m, self._phrase * _PHRASE.yaw_rad)
        self._look()

    def step(self, action: np.ndarray) -> Outcome:
        """Raises ConfigError unless action is 7 finite numbers. After the task's last step the episode is over."""
        action = check_action(action)
        self._command = 1.0 if action[6] > 0.5 else 0.0
        sent = np.append(action[:6], 2.0 * self._command - 1.0).astype(np.float32)
        self._env._step_action(sent[None])  # `step` without the picture, which takes ten times as long
        self._info = self._env.get_info()
        self._step += 1
        self._oracle.follow(self._command == 0.0, self._build_scene())
        placed = bool(self._info["success"])
        self._stage = max(self._stage, 2 if placed else int(self._info["is_src_obj_grasped"]))
        self._look()
        is_over = self._step >= self._task.steps
        return Outcome(is_over and placed, is_over and not placed, self._stage)

    def ask_oracle(self) -> Primitive:
        said, is_shut = self._oracle.speak(self._build_scene())
        return said._replace(gripper=int((0.0 if is_shut else 1.0) - self._command))

    def close(self) -> None:
        self._env.close()

    @property
    def _robot(self) -> Any:
        return self._env.agent.robot

    def _build_scene(self) -> Scene:
        env = self._env
        told = env.agent.controller.controllers["arm"]._target_pose.to_transformation_matrix()[0].numpy()
        hand, yaw = told[:3, 3].astype(np.float64), matrix_to_euler(told[:3, :3] @ DOWN.T)[2]
        return Scene(
            hand,
            float(yaw),
            lag=hand - self.proprio[:3],
            thing=self._build_body(env.source_obj_name),
            goal=self._build_body(env.target_obj_name),
            is_held=bool(env.agent.is_grasping(env.objs[env.source_obj_name])),
            is_placed=bool(self._info["success"]),
        )

    def _build_body(self, name: str) -> Body:
        pose = self._locate(self._env.objs[name].pose)
        return Body(pose[:3, 3], pose[:3, :3], self._env.episode_model_bbox_sizes[name].numpy().astype(np.float64))

    def _locate(self, pose: Any) -> np.ndarray:
        """float64 (4, 4) from the robot's base."""
        return (self._robot.pose.inv() * pose).to_transformation_matrix()[0].numpy().astype(np.float64)

    def _look(self) -> None:
        if self._image_size is None:
            self._image = np.zeros((0, 0, 3), np.uint8)
            return
        seen = self._env.get_obs(self._info)["sensor_data"][_CAMERA]["rgb"][0].numpy()
        # 640 x 480, squeezed into a square as Bridge's pictures were.
        self._image = np.asarray(Image.fromarray(seen).resize((self._image_size, self._image_size)))


@cache
def _import() -> tuple[Any, ...]:
    """ManiSkill3's modules."""
    names = ("mani_skill", "mani_skill.utils.registration", "mani_skill.utils.assets")
    return import_package(SIMPLER, *names, "mani_skill.envs.tasks.digital_twins")


def _make(name: str) -> Any:
    """ManiSkill3's environment; its renderer takes the GPU that there is, or else a Vulkan driver for the CPU.

    Raises ConfigError where its files or the driver are missing.
    """
    maniskill, registration, assets, _ = _import()
    missing = [asset for asset in _ASSETS if not assets.is_data_source_downloaded(asset)]
    if missing:
        raise ConfigError(
            f"--env simpler needs files that are not in {assets.DATA_SOURCES[missing[0]].output_dir}: "
            + "; ".join(f".venv/bin/python -m mani_skill.utils.download_asset {asset}" for asset in missing)
        )
    maniskill.logger.setLevel("ERROR")  # it warns of its own tasks, and of a missing GPU
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Creating a tensor from a list")
            return registration.REGISTERED_ENVS[name].cls(obs_mode="rgb+segmentation", sim_backend="cpu")
    except RuntimeError as error:
        raise ConfigError(f"--env simpler needs its files and a Vulkan driver, and could not start: {error}") from error


_import()

SUITE = Suite(
    name=SIMPLER,
    stages=dict.fromkeys(_TASKS, _STAGES),
    levels=("normal",),
    control_hz=5,
    max_steps=120,
    embodiment="simpler-widowx",
    table=_PHRASE,
    open=lambda task, level, image_size: SimplerEnv(task, image_size),
)
