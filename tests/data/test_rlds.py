import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tests import recordings
from vlm_local.cli import main
from vlm_local.data import count_episodes, open_data_set, open_episodes
from vlm_local.data.tfrecord import mask_crc
from vlm_local.errors import DataError
from vlm_local.primitives import iterate_labels

BRIDGE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "bridge_dev"


@pytest.fixture
def data_set(tmp_path):
    """Three episodes of 8, 1 and 6 steps in two shards; returns the folder."""
    records = [recordings.make_rlds_record(recordings.make_states(steps, steps)) for steps in (8, 1, 6)]
    recordings.write_rlds(tmp_path, records, shards=2)
    return tmp_path


def test_masked_checksum_of_the_check_value_in_rfc_3720():
    assert mask_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_episodes_come_back_as_they_were_written(data_set):
    episodes = list(open_episodes(data_set))
    assert [(episode.index, len(episode)) for episode in episodes] == [(0, 8), (1, 1), (2, 6)]
    np.testing.assert_array_equal(episodes[0].states, recordings.make_states(8, 8))
    np.testing.assert_array_equal(episodes[2].load_image(5), recordings.make_images(6)[5])
    assert episodes[0].instruction == "lift the cup"
    assert episodes[0].actions.shape == (8, 7)


def test_one_shard_can_be_read_alone(data_set):
    shard = sorted(data_set.glob("*.tfrecord*"))[1]
    assert [len(episode) for episode in open_episodes(shard)] == [6]


@pytest.mark.parametrize("position", [2, 9, 40, -2])
def test_a_flipped_byte_is_reported_with_file_and_offset_and_never_read(tmp_path, position):
    records = [recordings.make_rlds_record(recordings.make_states(4, seed)) for seed in range(3)]
    (path,) = recordings.write_rlds(tmp_path, records)
    data = bytearray(path.read_bytes())
    start = len(recordings.encode_record(records[0]))
    middle = data[start : start + len(recordings.encode_record(records[1]))]
    middle[position] ^= 16
    path.write_bytes(data[:start] + middle + data[start + len(middle) :])
    problems = []
    episodes = list(open_episodes(tmp_path, report=problems.append))
    broken_length = 0 <= position < 12
    assert [episode.index for episode in episodes] == ([0] if broken_length else [0, 2])
    assert len(problems) == 1 and f"{path}, byte {start}" in str(problems[0])
    with pytest.raises(DataError, match=f"byte {start}"):
        list(open_episodes(tmp_path))


def test_a_file_cut_off_anywhere_is_reported(tmp_path):
    records = [recordings.make_rlds_record(recordings.make_states(2, seed)) for seed in range(2)]
    (path,) = recordings.write_rlds(tmp_path, records)
    whole = path.read_bytes()
    first = len(recordings.encode_record(records[0]))
    for size in (first + 1, first + 11, first + 12, first + 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        problems = []
        assert [episode.index for episode in open_episodes(tmp_path, report=problems.append)] == [0]
        assert len(problems) == 1 and f"byte {first}" in str(problems[0])


def test_a_record_that_is_too_large_is_reported_and_the_next_one_read(tmp_path, monkeypatch):
    records = [recordings.make_rlds_record(recordings.make_states(steps)) for steps in (8, 1)]
    recordings.write_rlds(tmp_path, records)
    monkeypatch.setattr("vlm_local.data.tfrecord.MAX_RECORD_BYTES", len(records[0]) - 1)
    problems = []
    assert [episode.index for episode in open_episodes(tmp_path, report=problems.append)] == [1]
    assert len(problems) == 1 and f"a record of {len(records[0])} bytes" in str(problems[0])


def test_a_shard_that_is_no_file_is_refused_by_name(data_set):
    path = sorted(data_set.glob("*.tfrecord*"))[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=path.name):
        list(open_episodes(data_set))


def test_any_damage_behind_a_right_checksum_is_reported_not_raised(tmp_path):
    random = np.random.default_rng(0)
    record = recordings.make_rlds_record(recordings.make_states(3))
    for _ in range(300):
        damaged = bytearray(record)
        for position in random.integers(0, min(len(record), 400), 3):
            damaged[position] = random.integers(256)
        recordings.write_rlds(tmp_path, [bytes(damaged[: random.integers(1, len(record) + 1)])])
        problems = []
        for episode in open_episodes(tmp_path, report=problems.append):
            assert len(episode) and not problems


def _damage(folder: Path, **changes):
    """Rewrite the first record's Example with some features replaced."""
    states = recordings.make_states(4)
    features = {
        "steps/observation/state": states,
        "steps/observation/image_0": [recordings.encode_image(image) for image in recordings.make_images(4)],
        "steps/language_instruction": [b"go"] * 4,
    }
    features |= {f"steps/{name.replace('__', '/')}": value for name, value in changes.items()}
    recordings.write_rlds(folder, [recordings.encode_example({k: v for k, v in features.items() if v is not None})])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"observation__state": np.full((4, 7), np.nan, np.float32)}, "not finite"),
        ({"observation__state": np.zeros(9, np.float32)}, "not a record"),
        ({"observation__image_0": [b""] * 3}, "3 images"),
        ({"language_instruction": [b"go"] * 3}, "4 states, but 3 instructions"),
        ({"observation__image_0": None}, "lacks steps/observation/image_0"),
    ],
)
def test_a_record_that_is_no_episode_is_reported(tmp_path, changes, says):
    _damage(tmp_path, **changes)
    problems = []
    assert not list(open_episodes(tmp_path, report=problems.append))
    assert len(problems) == 1 and says in str(problems[0])


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (recordings.encode_image(np.zeros((32, 32), np.uint8)), "RGB image was expected, this one is L"),
        (recordings.encode_image(np.zeros((64, 32, 3), np.uint8)), "mixed sizes"),
        (recordings.encode_image(np.zeros((8, 8, 3), np.uint8)), "sides of 16"),
        (b"GIF89a", "not a readable"),
    ],
)
def test_an_image_of_another_kind_is_refused_and_the_others_are_read(tmp_path, image, says):
    good = recordings.encode_image(recordings.make_images(1)[0])
    _damage(tmp_path, observation__image_0=[good, image, good, good])
    (episode,) = open_episodes(tmp_path)
    episode.load_image(0)
    with pytest.raises(DataError, match=says):
        episode.load_image(1)
    episode.load_image(2)


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_file_that_goes_while_it_is_read_costs_its_frames(tmp_path, change):
    (path,) = recordings.write_walks(tmp_path, 1, num_steps=4)
    (episode,) = open_episodes(tmp_path)
    change(path)
    with pytest.raises(DataError, match=r"byte 0: the record can no longer be read"):
        episode.load_image(1)


def test_a_missing_camera_names_those_that_are_there(data_set):
    recordings.write_features(data_set, cameras=("image_0", "image_wrist"))
    with pytest.raises(DataError, match=r"no camera 'front'; it has image_0, image_wrist"):
        open_episodes(data_set, camera="front")


def test_a_missing_shard_is_reported(data_set):
    sorted(data_set.glob("*.tfrecord*"))[0].unlink()
    problems = []
    assert [len(episode) for episode in open_episodes(data_set, report=problems.append)] == [6]
    assert "shards [0] of 2 are missing" in str(problems[0])


def _write_splits(folder):
    """Two train shards of two episodes each, a val shard of one, and files beside them that are no shards."""
    recordings.write_features(folder)
    counts = {"train.tfrecord-00000-of-00002": 2, "train.tfrecord-00001-of-00002": 2, "val.tfrecord-00000-of-00001": 1}
    for name, count in counts.items():
        records = [recordings.make_rlds_record(recordings.make_states(4 + count))] * count
        (folder / f"demo-{name}").write_bytes(b"".join(map(recordings.encode_record, records)))
    for name in ("demo-train.tfrecord-00000-of-00002.bak", "demo-val.tfrecord-00000-of-00001_index.json"):
        (folder / name).write_bytes(b"no record")


def test_a_split_is_read_alone_and_all_of_them_are_named(tmp_path, capsys):
    _write_splits(tmp_path)
    whole = open_data_set(tmp_path)
    assert whole.about["splits"] == ["train", "val"] and len(list(whole.episodes)) == 5
    assert count_episodes(tmp_path, "train") == 4 and count_episodes(tmp_path) == 5
    assert main(["label", str(tmp_path), "--split", "val", "--out", str(tmp_path / "rows.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "5 steps of 1 episodes" in said and "RLDS, camera image_0, split val, state layout pose" in said
    assert main(["label", str(tmp_path), "--split", "test", "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "no split 'test'; it has train, val" in capsys.readouterr().err


def test_an_evaluation_reports_what_was_read(tmp_path):
    _write_splits(tmp_path)
    arguments = ["--data", str(tmp_path), "--policy", "stop", "--split", "val", "--out", str(tmp_path / "out")]
    assert main(["eval", *arguments]) == 0
    data = json.loads((tmp_path / "out/report.json").read_text())["data"]
    assert (data["splits"], data["camera"], data["state_layout"]) == (["val"], "image_0", "pose")
    assert main(["eval", *arguments[:4], "--out", str(tmp_path / "out"), "--resume"]) == 2  # other rows


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (gzip.compress, "the file is compressed; gunzip it first"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 9\n", "Git LFS's pointer"),
        (lambda data: b"<html>not found</html>", "no record begins here"),
    ],
)
def test_what_a_file_is_that_begins_with_no_record_is_said(tmp_path, change, says):
    (path,) = recordings.write_walks(tmp_path, 1, num_steps=4)
    path.write_bytes(change(path.read_bytes()))
    problems = []
    assert not list(open_episodes(tmp_path, report=problems.append))
    assert len(problems) == 1 and says in str(problems[0])


def test_a_feature_without_a_name_is_one_that_nobody_asks_for(tmp_path):
    nameless = b"\x0a\x04\x0a\x02\x12\x00"  # protobuf writes no empty key
    record = recordings.make_rlds_record(recordings.make_states(4))
    recordings.write_rlds(tmp_path, [nameless, record])
    problems = []
    assert [len(episode) for episode in open_episodes(tmp_path, report=problems.append)] == [4]
    assert len(problems) == 1 and "the record lacks steps/observation/state" in str(problems[0])


def test_features_that_are_written_otherwise_are_not_called_a_missing_camera(data_set):
    """As old versions of TensorFlow Datasets wrote them."""
    content = {"type": "FeaturesDict", "content": {"steps": {"type": "Dataset", "content": {}}}}
    (data_set / "features.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"features.json describes no steps of episodes \(featuresDict: steps"):
        open_episodes(data_set)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"tensor": {"dtype": "int32", "shape": {"dimensions": ["7"]}}}, "must be an unencoded tensor of floats"),
        ({"tensor": {"dtype": "float32", "encoding": "zlib", "shape": {"dimensions": ["7"]}}}, "unencoded tensor"),
        ({"tensor": {"dtype": "float32", "shape": {"dimensions": ["0"]}}}, "unencoded tensor"),
        ({"tensor": {"dtype": "float32", "shape": {"dimensions": ["50", "50"]}}}, "unencoded tensor"),
        (None, "has none of steps/observation/state, steps/observation/proprio; it has steps/action"),
    ],
)
def test_a_state_that_is_no_row_of_floats_is_refused(data_set, state, says):
    path = data_set / "features.json"
    features = json.loads(path.read_text())
    step = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    fields = step["observation"]["featuresDict"]["features"]
    del fields["state"]
    fields |= {} if state is None else {"state": state}
    fields["mask"] = {"image": "none"}  # which is no camera
    path.write_text(json.dumps(features))
    with pytest.raises(DataError, match=says):
        open_data_set(data_set)


def test_depth_maps_and_masks_are_no_cameras(data_set):
    recordings.write_features(data_set, cameras=("image_depth", "mask", "rgb"))
    path = data_set / "features.json"
    features = json.loads(path.read_text())
    step = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    cameras = step["observation"]["featuresDict"]["features"]
    cameras["image_depth"]["image"] |= {"dtype": "uint16", "shape": {"dimensions": ["64", "64", "1"]}}
    cameras["mask"]["image"] |= {"dtype": "uint8", "shape": {"dimensions": ["64", "64", "1"]}}
    path.write_text(json.dumps(features))
    assert open_data_set(data_set).about["camera"] == "rgb"


def test_a_folder_of_no_known_format_says_what_was_expected(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no known format; expected .*features.json.*info.json"):
        open_episodes(tmp_path)
    with pytest.raises(DataError, match="no file or folder"):
        open_episodes(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no TFRecord file"):
        recordings.write_features(tmp_path)
        open_episodes(tmp_path)


def test_a_hidden_folder_is_no_data_set(tmp_path):
    """`hf download --local-dir` leaves .cache beside the data set's folders, git leaves .git."""
    recordings.write_walks(tmp_path / "demo/1.0.0", 1, num_steps=4)
    (tmp_path / "demo/.cache/huggingface").mkdir(parents=True)
    assert [len(episode) for episode in open_episodes(tmp_path)] == [4]


def test_of_several_data_sets_or_a_part_of_one_the_message_names_those_that_are_near(tmp_path):
    record = recordings.make_rlds_record(recordings.make_states(4))
    for version in ("0.1.0", "1.0.0"):
        recordings.write_rlds(tmp_path / "demo" / version, [record])
    recordings.write_lerobot(tmp_path / "lerobot", [recordings.make_states(4)])
    for path, near in (
        ("", ["lerobot", "demo/0.1.0", "demo/1.0.0"]),
        ("demo", ["demo/0.1.0", "demo/1.0.0"]),
        ("lerobot/data", ["lerobot"]),
        ("lerobot/meta/info.json", ["lerobot"]),
        ("demo/1.0.0/features.json", ["demo/1.0.0"]),
    ):
        with pytest.raises(DataError, match="no known format") as caught:
            open_episodes(tmp_path / path)
        listed = str(caught.value).partition("one of which may be meant: ")[2]
        assert listed == ", ".join(str(tmp_path / name) for name in near)


def test_label_writes_a_row_a_step_and_names_what_it_leaves_out(data_set, tmp_path, capsys):
    out = tmp_path / "labels" / "rows.jsonl"
    assert main(["label", str(data_set), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == list(iterate_labels(open_episodes(data_set), lambda error: None))
    assert [(row["episode"], row["step"]) for row in rows] == [(0, step) for step in range(8)] + [
        (2, step) for step in range(6)
    ]
    printed = capsys.readouterr()
    assert "14 steps of 2 episodes labelled, 1 problem" in printed.out and "1 step(s)" in printed.err


def test_label_without_a_single_label_is_an_error_and_leaves_no_file(tmp_path, capsys):
    recordings.write_walks(tmp_path, 1, num_steps=1)
    assert main(["label", str(tmp_path), "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "no step could be labelled" in capsys.readouterr().err
    assert not list(tmp_path.glob("rows.jsonl*"))


@pytest.mark.skipif(not BRIDGE.is_dir(), reason="the real Bridge sample is not beside the repository")
def test_labels_of_real_bridge_data_agree_with_the_independent_ones():
    expected = json.loads((BRIDGE / "labels.json").read_text())
    rows = list(iterate_labels(open_episodes(BRIDGE), lambda error: pytest.fail(str(error))))
    assert rows == [
        {"episode": episode["index"], "step": step, "phrase": phrase, "full_window": full}
        for episode in expected["episodes"]
        for step, (phrase, full) in enumerate(zip(episode["phrases"], episode["full_window"], strict=True))
    ]
    assert len(rows) == 140
    for episode, truth in zip(open_episodes(BRIDGE, camera="image_1"), expected["episodes"], strict=True):
        assert episode.instruction == truth["instruction"]
        assert episode.load_image(9).shape == (64, 64, 3)
