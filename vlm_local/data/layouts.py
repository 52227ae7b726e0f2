"""Layouts of recorded states, and the names of columns that say one."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_local.data.rotations import axis_angle_to_matrix, quaternion_to_matrix
from vlm_local.embodiments import AUTO
from vlm_local.errors import DataError


@dataclass(frozen=True)
class StateLayout:
    """A state of `width` numbers: x, y, z, a rotation, and what the gripper does.

    rotation: how many numbers it has, and the function that makes them matrices; None where they are roll, pitch,
    yaw already. fingers: the last two numbers are the fingers' places in metres, not an opening of 0 to 1.
    frame: of roll, pitch, yaw: "bridge", "base", or AUTO where the roll that an episode begins with tells.
    """

    name: str
    width: int
    columns: str
    rotation: tuple[int, Callable[[np.ndarray], np.ndarray] | None] = (3, None)
    fingers: bool = False
    frame: str = AUTO

    @property
    def is_quaternion(self) -> bool:
        return self.rotation[0] == 4


POSE = StateLayout("pose", 7, "x y z roll pitch yaw gripper")
PADDED_POSE = StateLayout("pose-pad", 8, "x y z roll pitch yaw 0 gripper")
AXIS_ANGLE = StateLayout("axis-angle", 7, "x y z, axis times angle, gripper", (3, axis_angle_to_matrix))
LIBERO = StateLayout("libero", 8, "x y z, axis times angle, two fingers in metres", (3, axis_angle_to_matrix), True)
LAYOUTS = {
    layout.name: layout
    for layout in (
        POSE,
        PADDED_POSE,
        AXIS_ANGLE,
        LIBERO,
        StateLayout("quaternion-xyzw", 8, "x y z qx qy qz qw gripper", (4, quaternion_to_matrix)),
        StateLayout(
            "quaternion-wxyz",
            8,
            "x y z qw qx qy qz gripper",
            (4, lambda numbers: quaternion_to_matrix(numbers[:, [1, 2, 3, 0]])),
        ),
    )
}

# Column names that say a layout, without prefixes such as eef_; LIBERO's first port calls its axis times angle
# roll, pitch, yaw. In names of Open X-Embodiment ports, rx ry rz rw is a quaternion.
_NAMES = {
    "x y z roll pitch yaw gripper": "pose",
    "x y z roll pitch yaw pad gripper": "pose-pad",
    "x y z axis_angle1 axis_angle2 axis_angle3 gripper": "axis-angle",
    "x y z axis_angle1 axis_angle2 axis_angle3 gripper gripper": "libero",
    "x y z roll pitch yaw gripper gripper": "libero",
    "x y z qx qy qz qw gripper": "quaternion-xyzw",
    "x y z rx ry rz rw gripper": "quaternion-xyzw",
    "x y z qw qx qy qz gripper": "quaternion-wxyz",
}
_PREFIX = re.compile(r"((state|observation|robot|arm|eef|ee|tcp|end_effector|position|pos)[._])+")
_GRIPPER = re.compile(r"gripper([_.](\d|left|right|state|position|pos|open|openness|opening))?|(left|right)_finger")
_COUNT = re.compile(r"\b(\d+)\s*(?:x|d)\b", re.IGNORECASE)  # "7x robot joint angles", "6D pose"


def list_layouts(width: int | None = None) -> str:
    """Names and columns of the layouts; width: of those alone that have so many numbers."""
    fitting = (layout for layout in LAYOUTS.values() if width in (None, layout.width))
    return ", ".join(f"{layout.name} ({layout.columns})" for layout in fitting)


def read_names(names: Sequence[str]) -> StateLayout:
    plain = [_PREFIX.sub("", name.strip().lower()) for name in names]
    said = " ".join("gripper" if _GRIPPER.fullmatch(name) else name for name in plain)
    if said not in _NAMES:
        raise DataError(f"its columns are {', '.join(names)}")
    return LAYOUTS[_NAMES[said]]


def check_description(description: str, width: int) -> None:
    """Refuses joint angles. Counts that do not add up to the width are of a copied description, such as Bridge's."""
    counts = [int(count) for count in _COUNT.findall(description)]
    if "joint" in description.lower() and sum(counts) in (0, width):
        raise DataError(f"its description is {description!r}")
