import os
import pickle
import sys
import types

import lz4.frame
import numpy as np
import pytest

from tests import recordings
from tests.embodiments.station import from_bridge
from vlm_local.data import open_data_set, open_episodes
from vlm_local.data.selection import Selection
from vlm_local.errors import DataError


class TrajData:
    """Pickles as robot_eval_logger's class does: by name, with attributes."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


class Histogram(TrajData):
    pass


@pytest.fixture(autouse=True)
def logger_modules(monkeypatch):
    """The modules that the logger's pickles name, for as long as they are written."""
    for cls, name in ((TrajData, "robot_eval_logger.typing.traj_data"), (Histogram, "wandb.sdk.data_types.histogram")):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(name))
        setattr(sys.modules[name], cls.__name__, cls)
        monkeypatch.setattr(cls, "__module__", name)


def _trajectory(states, seed=0, **changes):
    """As the logger writes it: the action of a step beside the frame and proprio that follow it."""
    pad = np.insert(states, 6, 0, axis=1).astype(np.float64)
    pad[:, 7] *= 0.39
    return {
        "language_command": "open the drawer",
        "success": True,
        "obs": {"image_primary": list(recordings.make_images(len(states), seed)), "image_wrist": [None] * len(states)},
        "action": list(np.diff(states, axis=0, prepend=states[:1])),
        "proprio": list(pad),
        "max_joint_efforts": Histogram(bins=np.arange(3)),
        **changes,
    }


def _refuse(error):
    raise error


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_logged_trajectory_is_read(tmp_path, protocol):
    for number in (0, 2, 10):
        states = recordings.make_states(6 + number, number)
        data = pickle.dumps(TrajData(**_trajectory(states, number)), protocol)
        (tmp_path / f"traj_{number}.pkl").write_bytes(data)
    episodes = list(open_episodes(tmp_path))
    assert [(episode.index, len(episode)) for episode in episodes] == [(0, 5), (1, 7), (2, 15)]
    assert (episodes[1].instruction, episodes[1].success) == ("open the drawer", True)
    states = recordings.make_states(8, 2)
    np.testing.assert_allclose(episodes[1].states, states[:-1], rtol=1e-6)
    np.testing.assert_array_equal(episodes[1].load_image(3), recordings.make_images(8, 2)[3])
    # Each action leads from the state beside it to the next one.
    np.testing.assert_allclose(episodes[1].states + episodes[1].actions, states[1:], atol=1e-5)


def test_a_stations_rotations_are_measured_from_the_gripper_pointing_down(tmp_path):
    bridge = recordings.make_states(9)
    bridge[:, 3:6] *= 0.3
    base = bridge.copy()
    base[:, 3:6] = [from_bridge(angles) for angles in bridge[:, 3:6]]
    (tmp_path / "traj_0.pkl").write_bytes(pickle.dumps(TrajData(**_trajectory(base))))
    (episode,) = open_episodes(tmp_path)
    np.testing.assert_allclose(episode.states, bridge[:-1], atol=1e-5)
    for name, expected in (("autoeval-widowx", bridge), ("bridge-widowx", base)):
        (episode,) = open_data_set(tmp_path, Selection(embodiment=name)).episodes
        np.testing.assert_allclose(episode.states, expected[:-1], atol=1e-5)


def test_the_loggers_later_format_is_read_compressed_and_stacked(tmp_path):
    states = recordings.make_states(6)
    jpegs = [recordings.encode_image(image, "JPEG") for image in recordings.make_images(6)]
    fields = _trajectory(states, obs={"image_primary": jpegs}, end_effector_pose=states[:, :6], gripper=states[:, 6:])
    del fields["proprio"]
    (tmp_path / "traj_0.pkl").write_bytes(lz4.frame.compress(pickle.dumps(TrajData(**fields), 5)))
    (episode,) = open_episodes(tmp_path)
    np.testing.assert_array_equal(episode.states, states)
    assert np.abs(episode.load_image(0).astype(int) - recordings.make_images(6)[0]).mean() < 6


class Episode:
    """As the logger's example of its later format has it: a class of the program that wrote the file."""

    __module__ = "__main__"


def test_the_later_formats_pose_is_a_quaternion_with_w_first(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "Episode", Episode, raising=False)
    pitch = 0.11 * np.arange(6)  # about the base's y: the last number of the pose is 0 throughout, and is no padding
    pose = np.stack([0.3 + 0 * pitch, 0 * pitch, 0.2 + 0 * pitch, np.cos(pitch / 2), 0 * pitch, np.sin(pitch / 2)], 1)
    episode = Episode()
    vars(episode).update(
        language_command="lift the cup",
        success=False,
        policy_id=None,
        obs={"image_primary": recordings.make_images(6)},
        action=np.zeros((6, 7), np.float32),
        joint_position=np.zeros((6, 7), np.float32),
        end_effector_pose=np.append(pose, np.zeros((6, 1)), axis=1).astype(np.float32),
        gripper=np.ones((6, 1), np.float32),
    )
    (tmp_path / "traj_0.pkl").write_bytes(lz4.frame.compress(pickle.dumps(episode, 5)))
    (read,) = open_episodes(tmp_path)
    np.testing.assert_allclose(read.states[:, 3:6], np.stack([0 * pitch, pitch, 0 * pitch], 1), atol=1e-6)
    assert (read.instruction, read.success, read.actions) == ("lift the cup", False, None)
    np.testing.assert_array_equal(read.load_image(5), recordings.make_images(6)[5])


def test_a_teleop_recording_is_split_where_an_episode_is_done(tmp_path):
    states = recordings.make_states(9)
    trajectory = _trajectory(states)
    steps = [
        {
            "action": trajectory["action"][step],
            "observation": {
                "image_primary": trajectory["obs"]["image_primary"][step],
                "state": trajectory["proprio"][step],
            },
            "metadata": {"language_instruction": "close the drawer"},
            "done": step == 5,
        }
        for step in range(9)
    ]
    (tmp_path / "record.pkl").write_bytes(pickle.dumps(steps))
    episodes = list(open_episodes(tmp_path / "record.pkl"))
    assert [len(episode) for episode in episodes] == [6, 3]
    assert episodes[1].instruction == "close the drawer"
    np.testing.assert_allclose(episodes[1].states, states[6:], rtol=1e-6)
    np.testing.assert_array_equal(episodes[1].load_image(2), trajectory["obs"]["image_primary"][8])
    np.testing.assert_array_equal(episodes[1].actions, trajectory["action"][6:])


class Bomb:
    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


class Innocent:
    pass


@pytest.mark.parametrize("kind", ["code", "class", "partial", "eval"])
def test_a_pickle_that_asks_for_anything_else_is_refused_before_it_runs(tmp_path, kind):
    bait = {
        "code": pickle.dumps(_trajectory(recordings.make_states(3), extra=Bomb(tmp_path / "ran"))),
        "class": pickle.dumps(Innocent()),
        "partial": pickle.dumps(__import__("functools").partial(print)),
        "eval": b"c__builtin__\neval\n(V__import__('os').mkdir('ran')\ntR.",
    }
    (tmp_path / "traj_0.pkl").write_bytes(bait[kind])
    (tmp_path / "traj_1.pkl").write_bytes(pickle.dumps(_trajectory(recordings.make_states(4))))
    problems = []
    assert [episode.index for episode in open_episodes(tmp_path, report=problems.append)] == [1]
    assert len(problems) == 1 and "traj_0.pkl, byte" in str(problems[0]) and "could run code" in str(problems[0])
    assert not (tmp_path / "ran").exists()


def test_damaged_pickles_are_reported_not_raised(tmp_path):
    whole = pickle.dumps(TrajData(**_trajectory(recordings.make_states(3))), 5)
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        (tmp_path / "traj_0.pkl").write_bytes(data[: random.integers(1, len(data) + 1)])
        problems = []
        episodes = list(open_episodes(tmp_path, report=problems.append))
        assert len(episodes) + len(problems) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"proprio": None}, "neither proprio nor end_effector_pose"),
        ({"proprio": [[0.0] * 14] * 4}, "unknown layout"),
        ({"proprio": None, "end_effector_pose": np.zeros((4, 7)), "gripper": np.zeros((4, 1))}, "of length 1"),
        ({"proprio": None, "end_effector_pose": np.zeros((4, 7)), "gripper": np.zeros((4, 2))}, "have 7 and 2 numbers"),
        ({"proprio": None, "end_effector_pose": np.zeros((4, 3)), "gripper": np.zeros((4, 1))}, "have 3 and 1 numbers"),
        ({"obs": {"image_primary": []}}, "0 images, but 4 states"),
        ({"obs": None}, "obs must be a dictionary"),
        ({"obs": {}}, "it has none"),
        ({"obs": {"image_primary": 4}}, r"not a trajectory \(TypeError\)"),
        ({"proprio": [[0.3, 0, 0.1, 0, 0, 0, 0, 0.39]], "obs": {"image_primary": [None]}}, "a single step"),
    ],
)
def test_a_trajectory_that_is_no_episode_is_reported(tmp_path, changes, says):
    (tmp_path / "traj_0.pkl").write_bytes(pickle.dumps(_trajectory(recordings.make_states(4), **changes)))
    with pytest.raises(DataError, match=says):
        list(open_episodes(tmp_path, report=_refuse))


def test_a_folder_named_like_a_file_is_reported(tmp_path):
    (tmp_path / "traj_0.pkl").mkdir()
    problems = []
    assert not list(open_episodes(tmp_path, report=problems.append))
    assert len(problems) == 1 and "traj_0.pkl" in str(problems[0])


def test_recorded_actions_without_pictures_are_refused(tmp_path):
    (tmp_path / "scripted_policy.pkl").write_bytes(pickle.dumps([np.zeros(7)] * 3))
    with pytest.raises(DataError, match="no picture"):
        list(open_episodes(tmp_path))


def test_another_camera_and_frames_that_are_none(tmp_path):
    (tmp_path / "traj_0.pkl").write_bytes(pickle.dumps(_trajectory(recordings.make_states(4))))
    (episode,) = open_episodes(tmp_path, camera="image_wrist")
    with pytest.raises(DataError, match="an image was expected, not NoneType"):
        episode.load_image(0)
    with pytest.raises(DataError, match="no camera 'top'; it has image_primary, image_wrist"):
        list(open_episodes(tmp_path, camera="top"))
