"""Rotations as WidowX stations and Bridge data write them: roll, pitch, yaw about fixed axes, and matrices.

The convention is that of AutoEval's robot server: R = Rz(yaw) Ry(pitch) Rx(roll). Angles are in radians, arrays are
float64, and every function also takes leading dimensions.
"""

import numpy as np

# Bridge data measures from "gripper down", which is a pitch of pi/2 in the base frame: R_bridge = R_base @ DOWN.T.
DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])

_GIMBAL = 1e-6  # below it roll and yaw are not told apart; the robot server's own threshold


def euler_to_matrix(angles: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw (..., 3) -> rotation matrices (..., 3, 3)."""
    cos, sin = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    (cr, cp, cy), (sr, sp, sy) = cos, sin
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_euler(matrices: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) -> roll, pitch, yaw (..., 3), pitch within pi/2. At a pitch of pi/2 yaw is 0."""
    cos_pitch = np.hypot(matrices[..., 0, 0], matrices[..., 1, 0])
    pitch = np.arctan2(-matrices[..., 2, 0], cos_pitch)
    is_locked = cos_pitch < _GIMBAL
    roll = np.where(
        is_locked,
        np.arctan2(-matrices[..., 1, 2], matrices[..., 1, 1]),
        np.arctan2(matrices[..., 2, 1], matrices[..., 2, 2]),
    )
    yaw = np.where(is_locked, 0.0, np.arctan2(matrices[..., 1, 0], matrices[..., 0, 0]))
    return np.stack([roll, pitch, yaw], axis=-1)


def base_to_bridge(angles: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw (..., 3) of the base frame -> the same rotation measured from "gripper down"."""
    return matrix_to_euler(euler_to_matrix(angles) @ DOWN.T)


def bridge_to_matrix(angles: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw (..., 3) measured from "gripper down" -> matrices (..., 3, 3) of the base frame."""
    return euler_to_matrix(angles) @ DOWN


def find_nearest_euler(matrix: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The roll, pitch, yaw (3,) of `matrix` (3, 3) that differ least from `angles` (3,) in their largest difference.

    There are two families of solutions, each modulo 2 pi an angle; at a pitch of pi/2 only roll and yaw together
    are determined, and both take half of what they have to change.
    """
    solution = matrix_to_euler(matrix)
    roll, pitch, _ = solution
    if np.hypot(matrix[0, 0], matrix[1, 0]) < _GIMBAL:
        side = np.sign(pitch)  # the rotation depends on roll - side * yaw
        rest = _wrap(roll - (angles[0] - side * angles[2])) / 2
        solution = np.array([angles[0] + rest, pitch, angles[2] - side * rest])
    families = (solution, np.array([solution[0] + np.pi, np.pi - pitch, solution[2] + np.pi]))
    nearest = [angles + _wrap(family - angles) for family in families]
    return min(nearest, key=lambda found: np.abs(found - angles).max())


def measure_turn(first: np.ndarray, second: np.ndarray) -> float:
    """Angle between two rotation matrices (3, 3), 0 to pi."""
    turn = first.T @ second
    sine = np.linalg.norm([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    return float(np.arctan2(sine, np.trace(turn) - 1.0))


def _wrap(angles: np.ndarray | float) -> np.ndarray:
    """Into -pi..pi."""
    return (np.asarray(angles) + np.pi) % (2 * np.pi) - np.pi
