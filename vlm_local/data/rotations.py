"""Rotations as recordings hold them -> roll, pitch, yaw, without jumps where the gripper points down."""

import itertools

import numpy as np


def axis_angle_to_matrix(vectors: np.ndarray) -> np.ndarray:
    """Axis times angle in radians (T, 3) -> rotation matrices (T, 3, 3)."""
    angles = np.linalg.norm(vectors, axis=1)
    axes = vectors / np.where(angles > 0, angles, 1.0)[:, None]
    half = angles[:, None] / 2
    return quaternion_to_matrix(np.hstack([axes * np.sin(half), np.cos(half)]))


def quaternion_to_matrix(quaternions: np.ndarray) -> np.ndarray:
    """Quaternions x, y, z, w (T, 4), rounded or not -> rotation matrices (T, 3, 3)."""
    x, y, z, w = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def measure_from_start(matrices: np.ndarray) -> np.ndarray:
    """Rotation matrices (T, 3, 3) in the base frame -> roll, pitch, yaw about its x, y, z in radians (T, 3).

    They are measured from the right-angled orientation nearest to the first one, as Bridge measures them from the
    gripper pointing down: angles then stay small, whichever axis of the tool points along its fingers. A rotation
    between two steps does not depend on the tool's axes.
    """
    overlaps = np.einsum("nij,ij->n", _RIGHT_ANGLED, matrices[0])
    turned = matrices @ _RIGHT_ANGLED[overlaps.argmax()].T
    roll = np.arctan2(turned[:, 2, 1], turned[:, 2, 2])
    pitch = np.arcsin(np.clip(-turned[:, 2, 0], -1, 1))
    yaw = np.arctan2(turned[:, 1, 0], turned[:, 0, 0])
    return np.stack([roll, pitch, yaw], axis=1)


def _list_right_angled() -> np.ndarray:
    """The 24 rotations that map axes to axes (24, 3, 3)."""
    signed = (
        np.eye(3)[list(order)] * np.array(signs)[:, None]
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    )
    return np.array([matrix for matrix in signed if np.linalg.det(matrix) > 0])


_RIGHT_ANGLED = _list_right_angled()
