import json
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import recordings
from vlm_local.cli import main
from vlm_local.data import Selection, count_episodes, open_data_set, open_episodes
from vlm_local.data.video import load_frame
from vlm_local.errors import DataError
from vlm_local.primitives import iterate_labels

BRIDGE_NAMES = {"motors": ["x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper"]}
LENGTHS = (7, 40, 5)


def _states():
    return [recordings.make_states(length, length) for length in LENGTHS]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("images", ["video", "image"])
def test_episodes_come_back_as_they_were_written(tmp_path, version, images):
    recordings.write_lerobot(tmp_path, _states(), version, images, BRIDGE_NAMES)
    assert count_episodes(tmp_path) == 3
    episodes = list(open_episodes(tmp_path))
    assert [(episode.index, len(episode)) for episode in episodes] == list(enumerate(LENGTHS))
    assert [episode.instruction for episode in episodes] == ["lift the cup", "close the drawer", "lift the cup"]
    for number, (episode, states) in enumerate(zip(episodes, _states(), strict=True)):
        np.testing.assert_array_equal(episode.states, states)
        assert episode.actions.shape == states.shape
        frames = recordings.make_images(len(states), number)
        for step in (*range(len(states)), 0, len(states) - 1, 2):  # in order, then by seeking
            image = episode.load_image(step)
            assert image.shape == (32, 32, 3)
            assert np.abs(image.astype(int) - frames[step]).mean() < (6 if images == "video" else 1e-9)


def test_the_rate_is_said_since_labels_are_three_steps_of_any(tmp_path, capsys):
    recordings.write_lerobot(tmp_path / "data", _states(), images="image")
    _change_info(tmp_path / "data", fps=29.97)
    assert main(["label", str(tmp_path / "data"), "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert "read: LeRobot v2.1, 29.97 frames a second, camera image_0, state layout" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_labels_do_not_depend_on_the_format(tmp_path, version):
    recordings.write_lerobot(tmp_path / "lerobot", _states(), version, "image")
    recordings.write_rlds(tmp_path / "rlds", [recordings.make_rlds_record(states) for states in _states()])
    lerobot, rlds = (
        list(iterate_labels(open_episodes(tmp_path / name), lambda error: pytest.fail(str(error))))
        for name in ("lerobot", "rlds")
    )
    assert lerobot == rlds and len(rlds) == sum(LENGTHS)


def test_columns_of_unnamed_motors_are_judged_by_their_values(tmp_path):
    names = [f"motor_{number}" for number in range(7)]
    recordings.write_lerobot(tmp_path, _states(), images="image", names=names, state_width=7)
    assert len(list(open_episodes(tmp_path, camera="image_0"))) == 3


def test_joint_angles_are_no_state(tmp_path):
    names = [f"joint_{letter}" for letter in "abcdefg"]
    recordings.write_lerobot(tmp_path, _states(), images="image", names=names, state_width=7)
    with pytest.raises(DataError, match=r"its columns are joint_a, .*--state-layout NAME; there are pose \(x y z"):
        list(open_episodes(tmp_path))


def test_a_broken_table_is_reported_and_the_others_are_read(tmp_path):
    recordings.write_lerobot(tmp_path, _states(), images="image")
    broken = tmp_path / "data/chunk-000/episode_000001.parquet"
    broken.write_bytes(broken.read_bytes()[:-100])
    (tmp_path / "data/chunk-000/episode_000000.parquet").unlink()
    problems = []
    assert [episode.index for episode in open_episodes(tmp_path, report=problems.append)] == [2]
    assert len(problems) == 2 and all(f"episode_00000{n}.parquet" in str(p) for n, p in enumerate(problems))


@pytest.mark.parametrize("length", [39, 41])
def test_a_table_of_other_rows_than_the_index_says_is_reported(tmp_path, length):
    recordings.write_lerobot(tmp_path, _states(), images="image")
    lines = (tmp_path / "meta/episodes.jsonl").read_text().replace('"length": 40', f'"length": {length}')
    (tmp_path / "meta/episodes.jsonl").write_text(lines)
    problems = []
    assert [episode.index for episode in open_episodes(tmp_path, report=problems.append)] == [0, 2]
    assert f"meta/ says {length} rows of episode 1, the table has 40" in str(problems[0])


def _edit_table(path, edit):
    pq.write_table(edit(pq.read_table(path)), path)


def _put(table, name, values):
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda table: table.take([*range(39, -1, -1)]), "do not follow each other without a gap"),
        (lambda table: _put(table, "frame_index", [*range(20), *range(30, 50)]), "do not follow each other without"),
        (lambda table: _put(table, "frame_index", [*range(20), None, *range(21, 40)]), "do not follow each other"),
        (lambda table: _put(table, "episode_index", [1] * 20 + [7] * 20), "of episode 1, the table has 20"),
        (lambda table: _put(table, "timestamp", [0.0] * 40), "timestamps that rise were expected"),
        (lambda table: _put(table, "timestamp", [0.0, None, *np.arange(2, 40) / 5]), "timestamps that rise"),
        (lambda table: _put(table, "observation.state", [None, *table["observation.state"][1:]]), "in every row"),
        (
            lambda table: _put(table, "observation.state", [[0.0], *table["observation.state"].to_pylist()[1:]]),
            "as many numbers in every row were expected",
        ),
    ],
)
def test_rows_that_are_not_one_step_after_the_other_are_reported(tmp_path, edit, says):
    """A label across a gap, or backwards, looks like any other."""
    recordings.write_lerobot(tmp_path, _states())
    _edit_table(tmp_path / "data/chunk-000/episode_000001.parquet", edit)
    problems = []
    assert [episode.index for episode in open_episodes(tmp_path, report=problems.append)] == [0, 2]
    assert len(problems) == 1 and says in str(problems[0])


def test_the_order_of_episodes_in_a_file_is_the_tables_own(tmp_path):
    """meta/ lists them in another order, which tools that merge data sets write."""
    recordings.write_lerobot(tmp_path, _states(), "v3.0", "image")
    _edit_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet", lambda table: table.take([1, 0, 2]))
    for episode, length in zip(open_episodes(tmp_path), (40, 7, 5), strict=True):
        np.testing.assert_array_equal(episode.states, recordings.make_states(length, length))
        number = LENGTHS.index(length)
        np.testing.assert_array_equal(episode.load_image(length - 1), recordings.make_images(length, number)[-1])


@pytest.mark.parametrize(
    ("version", "name"), [("v2.1", "tasks.jsonl"), ("v2.1", "episodes.jsonl"), ("v3.0", "tasks.parquet")]
)
def test_a_file_that_is_missing_is_named(tmp_path, version, name):
    recordings.write_lerobot(tmp_path, _states(), version, "image")
    (tmp_path / "meta" / name).unlink()
    with pytest.raises(DataError, match=rf"meta/{name}: No such file or directory; a LeRobot {version} data set needs"):
        open_data_set(tmp_path)


def test_a_video_that_is_missing_broken_or_too_short_is_refused_by_frame(tmp_path):
    recordings.write_lerobot(tmp_path, _states())
    videos = tmp_path / "videos/chunk-000/observation.images.image_0"
    (videos / "episode_000000.mp4").unlink()
    (videos / "episode_000002.mp4").write_bytes(b"no video at all")
    recordings.write_video(videos / "episode_000001.mp4", recordings.make_images(20, 1))
    first, second, third = open_episodes(tmp_path)
    with pytest.raises(DataError, match=r"episode_000000.mp4: cannot be decoded"):
        first.load_image(0)
    second.load_image(19)
    with pytest.raises(DataError, match=r"no frame at 4\.000 s; the video is too short"):
        second.load_image(20)
    with pytest.raises(DataError, match=r"episode_000002.mp4: cannot be decoded"):
        third.load_image(0)


def test_a_video_without_colours_is_refused_as_a_picture_without_them_is(tmp_path):
    path = tmp_path / "depth.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "gray16le"
        frame = av.VideoFrame.from_ndarray(np.full((32, 32), 1000, np.uint16), format="gray16le")
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(DataError, match="a video in colour was expected, this one is gray16le"):
        load_frame(path, 0.0, fps=5)


def test_threads_do_not_disturb_each_other(tmp_path):
    """As `eval --workers` reads: each thread has the video that it reads open for itself."""
    recordings.write_lerobot(tmp_path, [recordings.make_states(12, seed) for seed in range(6)])
    episodes = list(open_episodes(tmp_path))

    def read(number):
        frames = recordings.make_images(12, number)
        return [np.abs(episodes[number].load_image(step).astype(int) - frames[step]).mean() for step in range(12)]

    with ThreadPoolExecutor(3) as pool:
        assert np.max(list(pool.map(read, [0, 1, 2, 3, 4, 5] * 2))) < 6


def test_every_fifth_frame_is_the_right_one(tmp_path):
    frames = recordings.make_images(120, 3)
    recordings.write_video(tmp_path / "long.mp4", frames)
    for step in (*range(0, 110, 5), 3, 109, 0, 60, 61, 40):
        image = load_frame(tmp_path / "long.mp4", 2.0 + step / 5, fps=5)
        assert np.abs(image.astype(int) - frames[10 + step]).mean() < 6, step


def test_the_nearest_frame_is_taken_not_the_first_within_half_a_step(tmp_path):
    """A video of 30 frames a second, of which the data set has every sixth."""
    frames = recordings.make_images(120, 3)
    recordings.write_video(tmp_path / "fast.mp4", frames, fps=30)
    for step in (*range(20), 3, 19, 0):
        image = load_frame(tmp_path / "fast.mp4", step / 5 + 0.01, fps=5)
        assert np.abs(image.astype(int) - frames[6 * step]).mean() < 6, step
        image = load_frame(tmp_path / "fast.mp4", step / 5 + 0.02, fps=5)
        assert np.abs(image.astype(int) - frames[min(6 * step + 1, 119)]).mean() < 6, step


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codebase_version": "v1.6"}, "format v1.6 is not known"),
        ({"features": {"action": {"dtype": "float32", "shape": [7]}}}, "no camera in colour; it has none"),
        ({"features": {"observation.images.front": {"dtype": "video", "shape": [1]}}}, "has no observation.state"),
        ({"fps": None}, "info.json is not a LeRobot"),
    ],
)
def test_a_data_set_without_what_an_episode_needs_is_refused(tmp_path, change, says):
    recordings.write_lerobot(tmp_path, _states(), images="image")
    path = tmp_path / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=says):
        open_episodes(tmp_path)


def test_a_missing_camera_names_those_that_are_there(tmp_path):
    recordings.write_lerobot(tmp_path, _states(), images="image")
    with pytest.raises(DataError, match="no camera 'wrist'; it has image_0"):
        open_episodes(tmp_path, camera="wrist")


def _change_info(folder, **changes):
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_picture_that_is_elsewhere_or_has_gone_is_refused_by_row(tmp_path):
    recordings.write_lerobot(tmp_path, _states()[:1], images="image")
    (path,) = tmp_path.rglob("episode_000000.parquet")
    table, name = pq.read_table(path), "observation.images.image_0"
    cells = [{"bytes": None, "path": "frames/0.png"}] * table.num_rows
    column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path)
    (episode,) = open_episodes(tmp_path)
    with pytest.raises(DataError, match=r"row 3: the image is not in the table but in frames/0\.png"):
        episode.load_image(3)
    (episode,) = open_episodes(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        episode.load_image(2)


def test_the_index_of_tasks_says_the_instruction_and_the_episodes_line_where_it_does_not(tmp_path):
    recordings.write_lerobot(tmp_path, _states(), images="image")
    episodes, tasks = tmp_path / "meta/episodes.jsonl", tmp_path / "meta/tasks.jsonl"
    episodes.write_text(episodes.read_text().replace("lift the cup", "fold the cloth"))
    assert next(open_episodes(tmp_path)).instruction == "lift the cup"
    tasks.write_text(tasks.read_text().replace('"task_index": 0', '"task_index": 7'))
    assert next(open_episodes(tmp_path)).instruction == "fold the cloth"


def test_a_split_is_a_range_of_episodes(tmp_path):
    recordings.write_lerobot(tmp_path, _states(), images="image")
    _change_info(tmp_path, splits={"train": "0:2", "val": "2:3"})
    assert (count_episodes(tmp_path, split="train"), count_episodes(tmp_path, split="val")) == (2, 1)
    val = open_data_set(tmp_path, Selection(split="val"))
    assert val.about["splits"] == ["val"] and [len(episode) for episode in val.episodes] == [5]
    assert count_episodes(tmp_path, "train") == 2
    assert open_data_set(tmp_path).about["splits"] == ["train", "val"]
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        open_data_set(tmp_path, Selection(split="test"))


@pytest.mark.parametrize(
    "depth",
    [
        {"dtype": "video", "shape": [32, 32, 3], "info": {"video.is_depth_map": True}},
        {"dtype": "image", "shape": [32, 32, 1]},
        {"dtype": "image", "shape": [1, 32, 32]},
    ],
)
def test_depth_maps_are_no_cameras_and_the_camera_taken_is_named(tmp_path, depth):
    recordings.write_lerobot(tmp_path, _states(), images="image")
    features = json.loads((tmp_path / "meta/info.json").read_text())["features"]
    ours = features.pop("observation.images.image_0")
    cameras = {"observation.images.a": depth, "observation.images.wrist": ours, "observation.images.front.rgb": ours}
    _change_info(tmp_path, features=cameras | features)
    assert open_data_set(tmp_path).about["camera"] == "front.rgb"
    with pytest.raises(DataError, match=r"no camera 'a'; it has wrist, front\.rgb"):
        open_data_set(tmp_path, Selection(camera="a"))


@pytest.mark.parametrize("name", ["episodes", "tasks"])
@pytest.mark.parametrize("number", [1, 3])
def test_the_last_line_of_an_index_may_lack_its_newline_and_lines_may_be_empty(tmp_path, name, number):
    recordings.write_lerobot(tmp_path, _states()[:number], images="image")
    path = tmp_path / f"meta/{name}.jsonl"
    path.write_text("\n  \n" + path.read_text().rstrip("\n"))
    problems = []
    episodes = list(open_episodes(tmp_path, report=problems.append))
    assert [len(episode) for episode in episodes] == list(LENGTHS[:number]) and not problems
    assert episodes[-1].instruction == "lift the cup"


@pytest.mark.parametrize("torn", ['{"episode_index": 2, "tas', "[" * 100_000])
def test_a_line_of_an_index_that_is_no_json_is_reported_and_the_others_are_read(tmp_path, torn):
    recordings.write_lerobot(tmp_path, _states()[:2], images="image")
    with (tmp_path / "meta/episodes.jsonl").open("a") as file:
        file.write(torn)
    problems = []
    assert [episode.index for episode in open_episodes(tmp_path, report=problems.append)] == [0, 1]
    assert len(problems) == 1 and "episodes.jsonl, line 3" in str(problems[0])
