"""What stands on the table in each kind of scene. Lengths in m; see scene.py for the frame."""

import itertools

import mujoco
import numpy as np

BLOCK_HALF_M = 0.02
NUM_BLOCKS = 3
NUM_DISTRACTORS = 2
PARKING_M = (0.3, 0.0, -0.5)  # below the table: what an episode does not use floats here

# The drawer, in the cabinet's own frame: -x is the way out, z up from the table.
HANDLE_OUT_M = 0.072  # from the closed front to the middle of the bar
HANDLE_GAP_OUT_M = 0.0375  # ... to the middle of the gap behind the bar
HANDLE_HEIGHT_M = 0.082
DRAWER_TRAVEL_M = 0.09

# The sink.
BASIN_CENTRE = (0.310, -0.035)
BASIN_HALF = (0.105, 0.105)
SLOPE_M = 0.035  # from a basin's wall to the foot of its slope
BASIN_FLOOR_M = 0.006
COUNTER_M = 0.045  # top of the tray
BASKET_CENTRE = (0.310, 0.155)
BASKET_HALF = (0.085, 0.075)
BASKET_FLOOR_M = 0.014
BASKET_RIM_M = 0.05
EGGPLANT_RADIUS_M = 0.019

# Contact bits: the arm touches things (1), things touch each other (2), fixed things both.
_ARM, _THINGS = 1, 2
SEEN = {"contype": 0, "conaffinity": 0}
FIXED = {"contype": 0, "conaffinity": _ARM | _THINGS}

_BOX = mujoco.mjtGeom.mjGEOM_BOX
_CYLINDER = mujoco.mjtGeom.mjGEOM_CYLINDER
_CAPSULE = mujoco.mjtGeom.mjGEOM_CAPSULE
_ELLIPSOID = mujoco.mjtGeom.mjGEOM_ELLIPSOID
_SPHERE = mujoco.mjtGeom.mjGEOM_SPHERE
_ROLLS = {"friction": [1.2, 0.02, 0.01], "condim": 6}  # and yet does not roll for ever
_GRIPS = {"friction": [1.2, 0.02, 0.002], "condim": 4}


def _add_thing(spec: mujoco.MjSpec, name: str):
    """A loose body, parked."""
    body = spec.worldbody.add_body(name=name, pos=PARKING_M)
    body.add_freejoint(name=name)
    return body


def _solid(mass: float, **contact) -> dict:
    return {"contype": _THINGS, "conaffinity": _ARM | _THINGS, "mass": mass, "material": "plastic", **contact}


def _add_blocks(spec: mujoco.MjSpec) -> None:
    for index in range(NUM_BLOCKS):
        body = _add_thing(spec, f"block{index}")
        body.add_geom(name=f"block{index}", type=_BOX, size=[BLOCK_HALF_M] * 3, **_solid(0.05, **_GRIPS))
    shapes = ((_CYLINDER, [0.018, 0.025, 0]), (_SPHERE, [0.02, 0, 0]))
    for index, (shape, size) in enumerate(shapes[:NUM_DISTRACTORS]):
        body = _add_thing(spec, f"distractor{index}")
        body.add_geom(name=f"distractor{index}", type=shape, size=size, **_solid(0.05, **_ROLLS))


def _add_drawer(spec: mujoco.MjSpec) -> None:
    """After AutoEval's toy drawer: a white cabinet, a red drawer, a bar to pull."""
    cabinet = spec.worldbody.add_body(name="cabinet", pos=[0.42, 0.12, 0])
    white = {"rgba": [0.9, 0.89, 0.86, 1], "material": "plastic", **FIXED}
    for name, position, size in (
        ("top", [0.07, 0, 0.107], [0.072, 0.068, 0.005]),
        ("bottom", [0.07, 0, 0.012], [0.070, 0.066, 0.012]),
        ("left", [0.07, 0.064, 0.056], [0.070, 0.004, 0.05]),
        ("right", [0.07, -0.064, 0.056], [0.070, 0.004, 0.05]),
        ("back", [0.138, 0, 0.056], [0.004, 0.066, 0.05]),
    ):
        cabinet.add_geom(name=f"cabinet_{name}", type=_BOX, pos=position, size=size, **white)
    slot = {"rgba": [0.25, 0.23, 0.22, 1], **SEEN}
    cabinet.add_geom(type=_BOX, pos=[0.07, 0, 0.1121], size=[0.010, 0.030, 0.0005], **slot)
    drawer = cabinet.add_body(name="drawer")
    drawer.add_joint(name="drawer", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[-1, 0, 0], range=[0, DRAWER_TRAVEL_M],
                     damping=[4.0], frictionloss=0.8, armature=0.05, limited=True)  # fmt: skip
    red = {"material": "plastic", "rgba": [0.78, 0.10, 0.20, 1], **FIXED}
    for name, position, size in (
        ("front", [-0.004, 0, 0.063], [0.005, 0.0585, 0.036]),
        ("floor", [0.06, 0, 0.033], [0.06, 0.055, 0.003]),
        ("left", [0.06, 0.053, 0.058], [0.06, 0.003, 0.028]),
        ("right", [0.06, -0.053, 0.058], [0.06, 0.003, 0.028]),
        ("back", [0.118, 0, 0.058], [0.003, 0.053, 0.028]),
    ):
        drawer.add_geom(name=f"drawer_{name}", type=_BOX, pos=position, size=size, mass=0.05, **red)
    dark = {"material": "plastic", "rgba": [0.30, 0.05, 0.08, 1], "mass": 0.02, **FIXED}
    ends = [-HANDLE_OUT_M, -0.048, HANDLE_HEIGHT_M, -HANDLE_OUT_M, 0.048, HANDLE_HEIGHT_M]
    drawer.add_geom(name="handle", type=_CAPSULE, fromto=ends, size=[0.006, 0, 0], **dark)
    for side in (-0.048, 0.048):
        post = [-0.009, side, HANDLE_HEIGHT_M, -HANDLE_OUT_M, side, HANDLE_HEIGHT_M]
        drawer.add_geom(type=_CAPSULE, fromto=post, size=[0.006, 0, 0], **dark)


def _add_sink(spec: mujoco.MjSpec) -> None:
    """After AutoEval's toy sink: a light blue tray with a basin, a yellow dish rack left of it, a tap."""
    _add_tray(spec)
    _add_basket(spec)
    _add_tap(spec)
    eggplant = _add_thing(spec, "eggplant")
    skin = {"rgba": [0.22, 0.12, 0.42, 1], "material": "plastic", "mass": 0, **SEEN}
    radius = EGGPLANT_RADIUS_M
    # A box collides in its place: flat sides lie still and can be gripped.
    hull = {"type": _BOX, "size": [0.036, radius - 0.002, radius - 0.001], "group": 4}
    eggplant.add_geom(name="eggplant", **hull, **_solid(0.05, **_GRIPS))
    eggplant.add_geom(type=_ELLIPSOID, pos=[0.012, 0, 0], size=[0.031, radius + 0.002, radius + 0.001], **skin)
    eggplant.add_geom(type=_ELLIPSOID, pos=[-0.004, 0, 0], size=[0.040, radius - 0.003, radius - 0.003], **skin)
    green = {"rgba": [0.24, 0.42, 0.14, 1], "mass": 0, **SEEN}
    eggplant.add_geom(type=_ELLIPSOID, pos=[-0.040, 0, 0], size=[0.009, 0.013, 0.013], **green)
    eggplant.add_geom(type=_CAPSULE, fromto=[-0.045, 0, 0, -0.058, 0, 0.004], size=[0.004, 0, 0], **green)


def _add_tray(spec: mujoco.MjSpec) -> None:
    (x, y), (half_x, half_y) = BASIN_CENTRE, BASIN_HALF
    rim, rack_half, half_z = 0.03, 0.09, COUNTER_M / 2
    blue = {"rgba": [0.50, 0.78, 0.90, 1], "material": "plastic", **FIXED}
    parts = (
        ("floor", [x, y, BASIN_FLOOR_M / 2], [half_x, half_y, BASIN_FLOOR_M / 2]),
        ("near", [x - half_x - rim / 2, y, half_z], [rim / 2, half_y, half_z]),
        ("far", [x + half_x + rim / 2, y, half_z], [rim / 2, half_y, half_z]),
        ("right", [x, y - half_y - rim / 2, half_z], [half_x + rim, rim / 2, half_z]),
        ("divider", [x, y + half_y + 0.005, half_z], [half_x + rim, 0.005, half_z]),
        ("rack", [x, y + half_y + 0.01 + rack_half, 0.004], [half_x + rim, rack_half, 0.004]),
    )
    for name, position, size in parts:
        spec.worldbody.add_geom(name=f"sink_{name}", type=_BOX, pos=position, size=size, **blue)
    deep = {"rgba": [0.36, 0.70, 0.88, 1], "material": "plastic", **SEEN}
    spec.worldbody.add_geom(name="basin", type=_BOX, pos=[x, y, BASIN_FLOOR_M], size=[half_x, half_y, 0.0008], **deep)
    spec.worldbody.add_geom(type=_CYLINDER, pos=[x, y, BASIN_FLOOR_M + 0.001], size=[0.016, 0.0011, 0],
                            material="metal", **SEEN)  # fmt: skip
    _add_slopes(spec)


def _add_slopes(spec: mujoco.MjSpec) -> None:
    """Slippery inner sides of the basin: what is dropped on its edge slides in."""
    (x, y), (half_x, half_y) = BASIN_CENTRE, BASIN_HALF
    for name, (way_x, way_y), top in (
        ("near", (-1, 0), COUNTER_M),
        ("far", (1, 0), COUNTER_M),
        ("right", (0, -1), COUNTER_M),
        ("left", (0, 1), BASKET_RIM_M),
    ):
        half = half_x if way_x else half_y
        rise = np.array([SLOPE_M * way_x, SLOPE_M * way_y, top])
        normal = np.array([-top * way_x, -top * way_y, SLOPE_M]) / np.linalg.norm(rise)
        foot = np.array([x, y, 0.0]) + (half - SLOPE_M) * np.array([way_x, way_y, 0])
        along = np.cross(normal, rise / np.linalg.norm(rise))
        frame, thickness = np.zeros(4), 0.002
        mujoco.mju_mat2Quat(frame, np.stack([rise / np.linalg.norm(rise), along, normal], axis=1).ravel())
        spec.worldbody.add_geom(
            name=f"slope_{name}",
            type=_BOX,
            pos=foot + rise / 2 - thickness * normal,
            quat=frame,
            size=[np.linalg.norm(rise) / 2, half_y if way_x else half_x, thickness],
            rgba=[0.44, 0.75, 0.89, 1],
            material="plastic",
            friction=[0.1, 0.005, 0.001],
            priority=1,
            **FIXED,
        )


def _add_basket(spec: mujoco.MjSpec) -> None:
    """Thin walls that collide and cannot be seen, and the wires that can."""
    (x, y), (half_x, half_y) = BASKET_CENTRE, BASKET_HALF
    low, high = BASKET_FLOOR_M, BASKET_RIM_M
    yellow = {"rgba": [0.93, 0.85, 0.55, 1], "material": "plastic"}
    world, middle, half_z = spec.worldbody, (low + high) / 2, (high - low) / 2
    world.add_geom(name="basket", type=_BOX, pos=[x, y, low - 0.002], size=[half_x, half_y, 0.002], **yellow, **FIXED)
    for sign in (-1, 1):
        hidden = {"type": _BOX, "group": 4, **FIXED}
        world.add_geom(pos=[x + sign * half_x, y, middle], size=[0.003, half_y, half_z], **hidden)
        world.add_geom(pos=[x, y + sign * half_y, middle], size=[half_x, 0.003, half_z], **hidden)
    rails, wires = [], []
    corners = [(x - half_x, y - half_y), (x + half_x, y - half_y), (x + half_x, y + half_y), (x - half_x, y + half_y)]
    for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
        rails.append(((*start, high), (*end, high), 0.004))
        for share in (0.0, 0.17, 0.33, 0.5, 0.67, 0.83):
            place = [first + share * (second - first) for first, second in zip(start, end, strict=True)]
            wires.append(((*place, low), (*place, high), 0.0022))
    _add_bars(spec, "rack", rails + wires)
    world.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="rack", **yellow, **SEEN)


def _add_bars(spec: mujoco.MjSpec, name: str, bars) -> None:
    """One mesh of upright or level bars (start, end, half thickness): drawn at once, much faster than each."""
    cube = np.array(list(itertools.product((-1, 1), repeat=3)))
    sides = np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
                      [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]])  # fmt: skip
    corners = [
        (np.array(start) + end) / 2 + cube * (np.abs(np.subtract(end, start)) / 2 + half) for start, end, half in bars
    ]
    faces = np.concatenate([sides + 8 * index for index in range(len(bars))])
    spec.add_mesh(
        name=name,
        uservert=np.concatenate(corners).ravel(),
        userface=faces.ravel(),
        inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL,
    )


def _add_tap(spec: mujoco.MjSpec) -> None:
    (x, y), grey = (0.445, -0.175), {"rgba": [0.62, 0.63, 0.66, 1], "material": "plastic", **SEEN}
    world = spec.worldbody
    world.add_geom(type=_BOX, pos=[x, y, COUNTER_M + 0.012], size=[0.022, 0.035, 0.012], **grey)
    path = ((x, y, 0.06), (x, y, 0.17), (x - 0.015, y + 0.006, 0.195), (x - 0.045, y + 0.018, 0.20),
            (x - 0.065, y + 0.026, 0.175))  # fmt: skip
    for start, end in itertools.pairwise(path):
        world.add_geom(type=_CAPSULE, fromto=[*start, *end], size=[0.010, 0, 0], **grey)


FURNITURE = {"blocks": _add_blocks, "drawer": _add_drawer, "sink": _add_sink}
