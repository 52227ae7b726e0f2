"""The room, the table and what stands on it, built in code: one model for each kind of scene.

Frame: the arm's base, +x forward, +y left, +z up from the table top; metres. Everything that an
episode varies (poses, colours, light, camera) is a field of the compiled model, see levels.py.
"""

import copy
from functools import cache

import mujoco
import numpy as np

from vlm_local.sim.arm import PHYSICS_STEP_S, load_arm
from vlm_local.sim.furniture import FIXED, FURNITURE, SEEN
from vlm_local.sim.textures import make_label, make_plaster, make_wood

CAMERA = "shoulder"
CAMERA_POSITION = (0.0, -0.25, 0.52)
CAMERA_TARGET = (0.31, 0.0, 0.02)
CAMERA_FOVY_DEG = 50.0
ARM_MATERIAL, ARM_RGB = "trossen_black", (0.15, 0.15, 0.165)

_BOX = mujoco.mjtGeom.mjGEOM_BOX
_CYLINDER = mujoco.mjtGeom.mjGEOM_CYLINDER


def build_scene(kind: str) -> mujoco.MjModel:
    """A model of its own, which an episode may vary. kind: a name in furniture.FURNITURE."""
    return copy.copy(_compile_scene(kind))


@cache  # a copy takes a fraction of the time, and there are few kinds
def _compile_scene(kind: str) -> mujoco.MjModel:
    spec = load_arm()
    _set_options(spec)
    _add_surfaces(spec)
    _add_room(spec)
    _add_clutter(spec)
    FURNITURE[kind](spec)
    return spec.compile()


def _set_options(spec: mujoco.MjSpec) -> None:
    spec.option.timestep = PHYSICS_STEP_S
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10
    # A 4096 shadow map and multisampling cost a CPU renderer nine tenths of its time.
    spec.visual.quality.offsamples = 0
    spec.visual.quality.numslices, spec.visual.quality.numstacks = 14, 7
    spec.visual.map.znear = 0.02
    spec.visual.map.zfar = 10
    spec.visual.map.shadowclip = 0.8  # wider than what is seen: the bias against speckles grows with it
    spec.stat.extent = 1.0
    spec.stat.center = [0.3, 0, 0.1]


def _add_surfaces(spec: mujoco.MjSpec) -> None:
    pictures = {
        "veneer": make_wood(1, 1),
        "planks": make_wood(2, 5),
        "plaster": make_plaster(3),
        "label0": make_label(4),
        "label1": make_label(9),
    }
    for name, picture in pictures.items():
        height, width, channels = picture.shape
        kind = mujoco.mjtTexture.mjTEXTURE_2D
        texture = spec.add_texture(name=name, type=kind, width=width, height=height, nchannel=channels)
        texture.data = picture.tobytes()
        material = spec.add_material(name=name, specular=0.15, shininess=0.3)
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name
    spec.add_material(name="plastic", specular=0.45, shininess=0.6)
    spec.add_material(name="metal", specular=0.9, shininess=0.8, rgba=[0.62, 0.64, 0.66, 1])


def _add_room(spec: mujoco.MjSpec) -> None:
    world = spec.worldbody
    world.add_geom(name="table", type=_BOX, size=[0.55, 0.75, 0.02], pos=[0.30, 0, -0.02], material="veneer",
                   friction=[0.9, 0.02, 0.001], **FIXED)  # fmt: skip
    world.add_geom(name="wall", type=_BOX, size=[0.02, 2, 1.2], pos=[0.95, 0, 0.4], material="plaster", **SEEN)
    world.add_geom(name="side", type=_BOX, size=[2, 0.02, 1.2], pos=[0, 0.95, 0.4], material="plaster", **SEEN)
    world.add_geom(name="floor", type=_BOX, size=[2, 2, 0.02], pos=[0, 0, -0.75], material="plaster",
                   rgba=[0.45, 0.45, 0.47, 1], **SEEN)  # fmt: skip
    sun = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
    world.add_light(name="lamp", type=sun, pos=[0.1, -0.5, 1.4], castshadow=True, specular=[0.3, 0.3, 0.3])
    spec.visual.headlight.ambient = [0.38, 0.38, 0.38]
    spec.visual.headlight.diffuse = [0.22, 0.22, 0.22]
    spec.visual.headlight.specular = [0.05, 0.05, 0.05]
    world.add_camera(name=CAMERA, pos=CAMERA_POSITION, fovy=CAMERA_FOVY_DEG)
    spec.material(ARM_MATERIAL).rgba = [*ARM_RGB, 1]
    spec.material(ARM_MATERIAL).specular = 0.4


def _add_clutter(spec: mujoco.MjSpec) -> None:
    """Tins at the back, out of the arm's reach: to be seen, not touched."""
    for index in range(2):
        tin = spec.worldbody.add_body(name=f"tin{index}", pos=[0.62, -0.25 - 0.12 * index, 0])
        tin.add_geom(type=_CYLINDER, size=[0.037, 0.05, 0], pos=[0, 0, 0.05], material=f"label{index}", **SEEN)
        tin.add_geom(type=_CYLINDER, size=[0.038, 0.003, 0], pos=[0, 0, 0.101], material="metal", **SEEN)
        tin.add_geom(type=_CYLINDER, size=[0.038, 0.003, 0], pos=[0, 0, 0.003], material="metal", **SEEN)


def look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Quaternion (4,) of a camera there that looks at the target, upright."""
    back = np.asarray(position, dtype=np.float64) - target
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    matrix = np.stack([right, np.cross(back, right), back], axis=1)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, matrix.ravel())
    return quaternion
