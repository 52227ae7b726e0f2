"""The WidowX AI arm: its model with light meshes, and pose control as on a Bridge robot.

Meshes and inertias are read from the installed package trossen-arm-sim (Apache-2.0). The gripper
pointing straight down is roll = pitch = yaw = 0, as in Bridge; its fingers then open along y.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np

from vlm_local.errors import ConfigError

NUM_JOINTS = 6
FINGER_RANGE_M = 0.044  # travel of each finger from closed to open
PHYSICS_STEP_S = 0.004
PHYSICS_STEPS = 50  # of one control step: 5 Hz

# Where the finger tips may be sent, m: lower and upper corner.
WORKSPACE = np.array([[0.15, -0.26, 0.012], [0.46, 0.26, 0.24]])
_SHOULDER = np.array([0.02, 0.1035])  # forward of the base's axis and up, m
_WRIST_ABOVE_TIPS_M = 0.2527  # gripper down
_REACH_M = 0.494  # shoulder to wrist; the elbow stops short of straight
_MAX_LEAD_M = 0.03  # the target never runs further ahead of an arm that is held up
_HOME = np.array([0.0, 1.1, 1.1, -1.5, 0.0, 0.0])
_WRIST_RANGE = (-2.1, 1.6)  # of joint_3, rad; the maker's -1.57 keeps a gripper that points down below 0.18 m
_DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])  # columns: link 6 axes, gripper down
_CELL_M = 0.008  # vertex clustering; 26,000 triangles become 3,000 and look the same at 256 px
_REACHED = 5e-4  # m and rad
_DAMPING = 1e-4
_NEXT, _LAST = [1, 2, 0], [2, 0, 1]  # the other two axes of x, y, z
_RAMP = 0.7  # share of a control step in which the joints travel; the rest settles


def load_arm() -> mujoco.MjSpec:
    """The arm alone at the origin, wrist camera removed, its meshes decimated, flat finger pads added."""
    spec = mujoco.MjSpec.from_file(str(_find_assets() / "wxai_follower.xml"))
    for mesh in list(spec.meshes):
        if mesh.name in ("camera_mount_d405", "d405"):
            _delete_geoms(spec, lambda geom, name=mesh.name: geom.meshname == name)
            spec.delete(mesh)
        else:
            vertices, faces = _load_light_mesh(mesh.file)
            mesh.file = ""
            mesh.uservert, mesh.userface = vertices.ravel(), faces.ravel()
    visual_box = mujoco.mjtGeom.mjGEOM_BOX
    _delete_geoms(spec, lambda geom: geom.parent.name == "link_6" and geom.type == visual_box and geom.pos[2] > 0.05)
    _delete_geoms(spec, lambda geom: geom.parent.name.startswith("carriage") and geom.type == visual_box)
    for side, inner in (("left", -0.023), ("right", 0.023)):
        spec.body(f"carriage_{side}").add_geom(
            name=f"pad_{side}",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=[0.052, inner - 0.003 * np.sign(inner), 0],
            size=[0.0175, 0.003, 0.008],
            group=3,
            friction=[1.6, 0.02, 0.001],
            condim=4,
            mass=0,
        )
    spec.joint("joint_3").range = spec.actuator("joint_3").ctrlrange = _WRIST_RANGE
    for geom in spec.geoms:
        touching = geom.group == 3  # the arm touches things (bit 1), never itself
        geom.contype, geom.conaffinity = int(touching), 0
    return spec


def _find_assets() -> Path:
    package = find_spec("trossen_arm_sim")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("the simulator needs the arm's meshes of trossen-arm-sim: .venv/bin/pip install -e .")
    return Path(package.submodule_search_locations[0]) / "assets"


def _delete_geoms(spec: mujoco.MjSpec, unwanted) -> None:
    for geom in [geom for geom in spec.geoms if unwanted(geom)]:
        spec.delete(geom)


@cache
def _load_light_mesh(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Binary STL -> vertices (V, 3) m and faces (F, 3), vertices within one cell merged to their mean."""
    data = (_find_assets() / file).read_bytes()
    triangle = np.dtype([("normal", "<3f4"), ("corners", "<9f4"), ("attribute", "<u2")])
    corners = np.frombuffer(data, triangle, offset=84)["corners"].reshape(-1, 3).astype(np.float64)
    _, cells = np.unique(np.floor(corners / _CELL_M).astype(int), axis=0, return_inverse=True)
    cells = cells.ravel()
    counts = np.bincount(cells)
    vertices = np.stack([np.bincount(cells, corners[:, axis]) / counts for axis in range(3)], axis=1)
    faces = cells.reshape(-1, 3)
    first, second, third = faces.T
    faces = faces[(first != second) & (second != third) & (third != first)]
    return vertices, np.unique(faces, axis=0)


class ArmController:
    """Moves the finger tips by Bridge actions: a pose target that accumulates, followed by joints.

    The joints come from damped least squares (Buss, "Introduction to Inverse Kinematics with
    Jacobian Transpose, Pseudoinverse and Damped Least Squares methods", 2009).
    """

    def __init__(self, model: mujoco.MjModel):
        self._model = model
        self._scratch = mujoco.MjData(model)
        self._site = model.site("ee_site").id
        self._lower, self._upper = model.jnt_range[:NUM_JOINTS].T
        self._jacobian = np.zeros((6, model.nv))

    def reset(self, data: mujoco.MjData, position: np.ndarray) -> None:
        """Put the arm there, gripper down and open. position: (3,) m of the tips."""
        self._position, self._rotation = np.array(position, dtype=np.float64), np.eye(3)
        joints = self._solve(_HOME, self._position, self._rotation, num_iterations=200)
        assert joints is not None  # every start position is within reach
        self._joints = joints
        data.qpos[:NUM_JOINTS] = self._joints
        data.qpos[NUM_JOINTS : NUM_JOINTS + 2] = FINGER_RANGE_M
        data.ctrl[:NUM_JOINTS] = self._joints
        data.ctrl[NUM_JOINTS] = FINGER_RANGE_M

    def step(self, data: mujoco.MjData, action: np.ndarray) -> None:
        """One control step of 0.2 s. action: (7,) as types.Decision.action."""
        tips = data.site_xpos[self._site]
        lead = self._position + action[:3] - tips
        lead *= min(1.0, _MAX_LEAD_M / max(np.linalg.norm(lead), 1e-9))
        self.move(data, _limit(tips + lead), _rotate(action[3:6]) @ self._rotation, np.clip(action[6], 0, 1))

    def move(self, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray, opening: float) -> bool:
        """One control step towards a pose; False where it is out of reach, and the arm stays where it was sent.

        position: (3,) m of the tips. rotation: (3, 3) from the gripper pointing down. opening: 0 closed..1 open.
        """
        start = self._joints
        joints = self._solve(start, position, rotation, num_iterations=20)
        if joints is not None:
            self._position, self._rotation, self._joints = position, rotation, joints
        data.ctrl[NUM_JOINTS] = opening * FINGER_RANGE_M
        travel = int(PHYSICS_STEPS * _RAMP)
        for index in range(travel):
            data.ctrl[:NUM_JOINTS] = start + (self._joints - start) * (index + 1) / travel
            mujoco.mj_step(self._model, data)
        mujoco.mj_step(self._model, data, nstep=PHYSICS_STEPS - travel)
        return joints is not None

    def _solve(self, joints: np.ndarray, position: np.ndarray, rotation: np.ndarray, num_iterations: int):
        """Joints (6,) rad near the given ones that reach the pose, or None."""
        scratch, model, jacobian = self._scratch, self._model, self._jacobian
        goal = rotation @ _DOWN
        for _ in range(num_iterations):
            scratch.qpos[:NUM_JOINTS] = joints
            mujoco.mj_kinematics(model, scratch)
            now = scratch.site_xmat[self._site].reshape(3, 3)
            turn = 0.5 * _cross_columns(now, goal).sum(axis=1)
            error = np.concatenate([position - scratch.site_xpos[self._site], turn])
            if np.abs(error).max() < _REACHED:
                return joints
            mujoco.mj_comPos(model, scratch)
            mujoco.mj_jacSite(model, scratch, jacobian[:3], jacobian[3:], self._site)
            arm = jacobian[:, :NUM_JOINTS]
            change = arm.T @ np.linalg.solve(arm @ arm.T + _DAMPING * np.eye(6), error)
            joints = np.clip(joints + change, self._lower, self._upper)
        return None


def _cross_columns(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """As np.cross(first, second, axis=0) for (3, n), which takes ten times as long for arrays this small."""
    return first[_NEXT] * second[_LAST] - first[_LAST] * second[_NEXT]


def _limit(position: np.ndarray) -> np.ndarray:
    """The nearest place in the workspace; horizontally also within the stretched arm's reach."""
    position = np.clip(position, *WORKSPACE)
    height = position[2] + _WRIST_ABOVE_TIPS_M - _SHOULDER[1]
    radius = _SHOULDER[0] + np.sqrt(_REACH_M**2 - height**2)
    position[:2] *= min(1.0, radius / np.linalg.norm(position[:2]))
    return position


def measure_proprio(model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
    """float64 (7,) as types.Observation.proprio: tips' position, rotation from gripper down, opening."""
    site = model.site("ee_site").id
    rotation = data.site_xmat[site].reshape(3, 3) @ _DOWN.T
    roll = np.arctan2(rotation[2, 1], rotation[2, 2])
    pitch = np.arcsin(np.clip(-rotation[2, 0], -1, 1))
    yaw = np.arctan2(rotation[1, 0], rotation[0, 0])
    opening = np.clip(data.qpos[NUM_JOINTS : NUM_JOINTS + 2].mean() / FINGER_RANGE_M, 0, 1)
    return np.array([*data.site_xpos[site], roll, pitch, yaw, opening])


def _rotate(angles: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw about the base's fixed x, y, z axes -> (3, 3)."""
    quaternion, matrix = np.zeros(4), np.zeros(9)
    mujoco.mju_euler2Quat(quaternion, np.asarray(angles, dtype=np.float64), "XYZ")
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)
