"""Marks are where the simulator's own camera sees the gripper, and the recording keeps the picture as it came."""

import json

import numpy as np
import pytest

from tests.slow import slow
from tests.tiny_models import tiny_checkpoint
from vlm_local.assembly import open_policies
from vlm_local.embodiments import load_embodiment
from vlm_local.errors import ConfigError
from vlm_local.marks import ARROW_M, Projection, draw_marks
from vlm_local.policy_options import PolicyOptions
from vlm_local.sim.arm import WORKSPACE
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.scene import CAMERA
from vlm_local.types import Observation

RED = (255, 40, 40)  # forward


@pytest.fixture(scope="module")
def simulator():
    """The camera as MuJoCo has it, not as the embodiment's file says it."""
    env = SimEnv("reach", level="easy", image_size=None)
    env.reset(seed=0)
    data, model = env.world.data, env.world.model
    index = model.camera(CAMERA).id
    yield data.cam_xpos[index].copy(), data.cam_xmat[index].reshape(3, 3).copy(), float(model.cam_fovy[index])
    env.close()


def project(camera, point, width, height):
    """MuJoCo's pinhole: it looks along -z of its frame, fovy spans the height."""
    position, rotation, fovy = camera
    x, y, z = rotation.T @ (point - position)
    focal = height / 2 / np.tan(np.radians(fovy) / 2)
    return np.array([width / 2 - focal * x / z, height / 2 + focal * y / z])


@pytest.fixture(scope="module")
def projection():
    return Projection.from_camera_matrix(load_embodiment("simulator").camera_matrix)


@pytest.mark.parametrize(("side", "num"), [(256, 200), slow(256, 1000), slow(224, 1000)])
def test_the_drawn_tip_of_forward_is_within_two_pixels_of_the_truth(simulator, projection, side, num):
    generator = np.random.default_rng(0)
    black = np.zeros((side, side, 3), np.uint8)
    worst, num_checked = 0.0, 0
    for position in generator.uniform(*WORKSPACE, (num, 3)):
        marked, about = draw_marks(black, position, "axes", projection)
        start = project(simulator, position, side, side)
        tip = project(simulator, position + np.array([ARROW_M, 0, 0]), side, side)
        assert np.linalg.norm(np.array(about["forward_px"]) - tip) < 0.1
        if not (tip.min() > 3 and tip.max() < side - 3):
            continue  # the tip is not in the picture
        rows, columns = np.nonzero((marked == RED).all(axis=2))
        pixels = np.stack([columns, rows], axis=1) + 0.5
        drawn = pixels[((pixels - start) @ (tip - start)).argmax()]
        worst, num_checked = max(worst, float(np.linalg.norm(drawn - tip))), num_checked + 1
    assert worst <= 2.0 and num_checked > 0.9 * num
    assert (black == 0).all()


def test_the_ring_is_where_the_simulator_draws_the_gripper(projection):
    """The fingertips move, and the pixels that change are around the mark."""
    env = SimEnv("reach", level="easy", image_size=256)
    env.reset(seed=3)
    before, first = env.observation.image.astype(int), env.observation.proprio[:3].copy()
    env.step(np.array([0, 0, 0.04, 0, 0, 0, 1.0]))
    after, second = env.observation.image.astype(int), env.observation.proprio[:3].copy()
    env.close()
    rows, columns = np.nonzero(np.abs(after - before).sum(axis=2) > 60)
    for position in (first, second):
        gripper = np.array(draw_marks(before.astype(np.uint8), position, "gripper", projection)[1]["gripper_px"])
        assert np.hypot(columns - gripper[0], rows - gripper[1]).min() < 4


def test_a_picture_of_another_size_is_marked_in_proportion(projection):
    position = np.array([0.3, 0.05, 0.1])
    [small, large] = (
        np.array(draw_marks(np.zeros(shape, np.uint8), position, "axes", projection)[1]["left_px"])
        for shape in ((256, 256, 3), (480, 640, 3))
    )
    np.testing.assert_allclose(large, small * [2.5, 1.875], atol=0.02)


def test_nothing_is_drawn_behind_the_camera_or_without_a_measurement(projection):
    image = np.zeros((64, 64, 3), np.uint8)
    marked, about = draw_marks(image, np.array([-1.0, -0.5, 1.0]), "axes", projection)
    assert (marked == 0).all() and "behind the camera" in about["not_drawn"]
    policies = open_policies(PolicyOptions(model=MODEL, marks="axes", embodiment="simulator"))
    decision = policies.build("robot").act(Observation(image, "lift the cup"))
    policies.close()
    assert decision.extra["marks"] == {"kind": "axes", "not_drawn": "the position of the gripper is not measured"}


MODEL = str(tiny_checkpoint("qwen2-vl"))


def test_the_model_sees_the_marks_and_the_caller_keeps_its_picture():
    """As the same picture, marked beforehand, without the flag."""
    projection = Projection.from_camera_matrix(load_embodiment("simulator").camera_matrix)
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    proprio = np.array([0.3, 0.0, 0.1, 0, 0, 0, 1.0])
    kept, said = image.copy(), {}
    marked, about = draw_marks(image, proprio[:3], "axes", projection)
    for marks, shown in (("axes", image), (None, marked), ("gripper", image)):
        policies = open_policies(
            PolicyOptions(model=MODEL, marks=marks, embodiment="simulator", posterior="exact", dtype="float32")
        )
        said[marks] = policies.build("robot").act(Observation(shown, "lift the cup", proprio))
        assert policies.metadata["marks"] == marks
        policies.close()
    assert (image == kept).all() and not (marked == kept).all()
    assert said["axes"].marginals == said[None].marginals != said["gripper"].marginals
    assert said["axes"].extra["marks"] == json.loads(json.dumps(about)) and "marks" not in said[None].extra


def test_the_fitted_camera_shows_where_the_gripper_of_bridge_is():
    """A point of each of eight episodes of BridgeData V2 (CC BY 4.0), read by eye in pictures of 64x64."""
    points = [  # x, y, z in m; u, v in pixels
        [0.238, -0.026, 0.124, 33.5, 29.7],
        [0.222, -0.019, 0.120, 31.1, 33.0],
        [0.301, -0.046, 0.144, 41.3, 18.2],
        [0.209, 0.107, 0.151, 9.5, 16.3],
        [0.228, 0.005, 0.097, 28.4, 31.7],
        [0.253, 0.114, 0.141, 14.6, 13.5],
        [0.242, -0.100, 0.092, 45.1, 40.8],
        [0.282, -0.084, 0.092, 45.7, 32.3],
    ]
    positions, seen = np.split(np.array(points), [3], axis=1)
    projection = Projection.from_camera_matrix(load_embodiment("bridge-toysink2").camera_matrix)
    off = np.linalg.norm(projection.locate(positions, 64, 64) - seen, axis=1)
    assert np.median(off) < 1.2 and off.max() < 2.6


def test_a_robot_whose_camera_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="bridge-widowx has no camera_matrix"):
        open_policies(PolicyOptions(model=MODEL, marks="axes"))
    with pytest.raises(ConfigError, match="--marks must be one of"):
        open_policies(PolicyOptions(model=MODEL, marks="dots", embodiment="simulator"))
    with pytest.raises(ConfigError, match="--marks would change nothing"):
        open_policies(PolicyOptions(model="stop", marks="axes", embodiment="simulator"))
