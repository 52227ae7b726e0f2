"""Files of strangers that would hang, bloat or crash a reader: each is reported, and nothing is waited for."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import recordings
from vlm_local.cli import main
from vlm_local.data import open_episodes
from vlm_local.data.questions import open_labelled
from vlm_local.data.runs import RunWriter
from vlm_local.data.tfrecord import mask_crc
from vlm_local.errors import DataError

DEEP = "[" * 200_000


def _label(folder, tmp_path, capsys):
    """`label` -> (exit status, what it said)."""
    status = main(["label", str(folder), "--out", str(tmp_path / "rows.jsonl")])
    said = capsys.readouterr()
    return status, said.out + said.err


def _write_lerobot(folder, **info):
    recordings.write_lerobot(folder, [recordings.make_states(5, seed) for seed in range(2)], images="image")
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | info))


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"data_path": "{episode_index:01000000000d}"}, "has other fields than episode_index"),
        ({"data_path": "{episode_index.__class__}"}, "has other fields than episode_index"),
        ({"data_path": "{episode}"}, "has other fields than episode_index"),
        ({"data_path": "{episode_index:{episode_index}d}"}, "has other fields than episode_index"),
        ({"data_path": "/etc/{episode_index}"}, "not in the data set's folder"),
        ({"data_path": "data/../../{episode_index}"}, "not in the data set's folder"),
        ({"chunks_size": 0}, "info.json is not a LeRobot"),
        ({"fps": float("nan")}, "info.json is not a LeRobot"),
        ({"fps": 0}, "info.json is not a LeRobot"),
        ({"total_episodes": "many"}, "info.json is not a LeRobot"),
        ({"features": None}, "info.json is not a LeRobot"),
        ({"features": {"observation.state": {"dtype": []}}}, "it has none"),
    ],
)
def test_what_info_json_says_is_not_believed(tmp_path, capsys, info, says):
    _write_lerobot(tmp_path / "data", **info)
    status, said = _label(tmp_path / "data", tmp_path, capsys)
    assert status == 2 and says in said


@pytest.mark.parametrize("line", ["5", "[]", "{}", '{"episode_index": "x", "length": 5}', '{"episode_index": 2}'])
def test_a_line_of_the_index_that_is_no_episode_is_reported(tmp_path, capsys, line):
    _write_lerobot(tmp_path / "data")
    with (tmp_path / "data/meta/episodes.jsonl").open("a") as file:
        file.write(line + "\n")
    status, said = _label(tmp_path / "data", tmp_path, capsys)
    assert status == 0 and "10 steps of 2 episodes labelled, 1 problem" in said


@pytest.mark.parametrize("length", ["null", "-5", "1e300", "true"])
def test_a_length_that_is_none_is_reported(tmp_path, capsys, length):
    _write_lerobot(tmp_path / "data")
    path = tmp_path / "data/meta/episodes.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(first.replace('"length": 5', f'"length": {length}') + "\n" + second)
    status, said = _label(tmp_path / "data", tmp_path, capsys)
    assert status == 0 and "1 problem" in said


def test_a_table_that_claims_more_numbers_than_memory_holds_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlm_local.data.lerobot._MAX_NUMBERS", 100)
    _write_lerobot(tmp_path / "data")
    path = tmp_path / "data/data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([0] * 50), path)
    status, said = _label(tmp_path / "data", tmp_path, capsys)
    assert status == 0 and "at most 100 are read" in said and "1 problem" in said


def test_nothing_is_waited_for(tmp_path, capsys):
    """A FIFO in place of each file of a data set."""
    kinds = {
        "lerobot": (lambda folder: _write_lerobot(folder), ["meta/episodes.jsonl", "meta/tasks.jsonl"], 2),
        "table": (lambda folder: _write_lerobot(folder), ["data/chunk-000/episode_000000.parquet"], 0),
        "rlds": (
            lambda folder: recordings.write_rlds(folder, [b"x"] * 2, 2),
            ["demo-train.tfrecord-00000-of-00002"],
            2,
        ),
        "run": (_write_run, ["episodes/robot-0/steps.jsonl", "episodes/robot-0/meta.json"], 0),
    }
    for kind, (write, names, status) in kinds.items():
        for number, name in enumerate(names):
            folder = tmp_path / f"{kind}{number}"
            write(folder)
            (folder / name).unlink()
            os.mkfifo(folder / name)
            ended, said = _label(folder, tmp_path, capsys)
            assert ended == status and "not a regular file" in said.lower(), (name, said)


def test_a_picture_that_is_none_is_not_waited_for(tmp_path):
    for answer in ("yes", "no"):
        (tmp_path / answer).mkdir()
        (tmp_path / answer / "0.png").write_bytes(recordings.encode_image(recordings.make_images(1)[0]))
    os.mkfifo(tmp_path / "no/1.png")
    problems = []
    assert len(list(open_labelled(tmp_path).open_images(problems.append))) == 2
    assert len(problems) == 1 and "not a regular file" in str(problems[0])


@pytest.mark.parametrize("name", ["features.json", "meta/info.json"])
def test_deep_json_is_no_description(tmp_path, capsys, name):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text(DEEP)
    status, said = _label(tmp_path / "data", tmp_path, capsys)
    assert status == 2 and "nested too deeply" in said


def test_deeply_nested_features_are_no_description(tmp_path, capsys):
    recordings.write_walks(tmp_path / "data", 1, num_steps=4)
    levels = 450
    text = '{"sequence": {"feature": ' * levels + "{}" + "}}" * levels
    (tmp_path / "data/features.json").write_text(text)
    status, said = _label(tmp_path / "data", tmp_path, capsys)
    assert status == 2 and said.startswith("vlm-local label: ")


@pytest.mark.parametrize(
    "tensor",
    [
        None,
        {"dtype": "float32"},
        {"dtype": 5, "shape": {"dimensions": ["7"]}},
        *({"dtype": "float32", "shape": {"dimensions": sizes}} for sizes in (["x"], ["-1"], ["0"], [10**18, 10**18])),
        {"dtype": "float32", "shape": ["7"]},
        {"dtype": "float32", "shape": {"dimensions": ["7"]}, "encoding": 1},
    ],
)
def test_a_state_of_no_shape_is_refused(tmp_path, capsys, tensor):
    recordings.write_walks(tmp_path / "data", 1, num_steps=4)
    path = tmp_path / "data/features.json"
    features = json.loads(path.read_text())
    step = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    step["observation"]["featuresDict"]["features"]["state"] = {"tensor": tensor}
    path.write_text(json.dumps(features))
    status, said = _label(tmp_path / "data", tmp_path, capsys)
    assert status == 2 and "must be an unencoded tensor of floats" in said


def test_a_record_longer_than_any_is_passed_over(tmp_path):
    """The file is sparse: it has the 3 GB on paper only."""
    recordings.write_features(tmp_path)
    size = 3 << 30
    length = struct.pack("<Q", size)
    whole = recordings.encode_record(recordings.make_rlds_record(recordings.make_states(4)))
    with (tmp_path / "demo-train.tfrecord-00000-of-00001").open("wb") as file:
        file.write(length + struct.pack("<I", mask_crc(length)))
        file.seek(size + 4, os.SEEK_CUR)
        file.write(whole)
    problems = []
    assert [episode.index for episode in open_episodes(tmp_path, report=problems.append)] == [1]
    assert len(problems) == 1 and "writes none over 2 GiB" in str(problems[0])


def _make_png(width, height):
    """A PNG that claims these sides and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _make_scans(count):
    buffer = io.BytesIO()
    Image.fromarray(recordings.make_images(1)[0]).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (_make_png(60_000, 60_000), "could be decompression bomb"),
        (_make_png(5000, 20), "image sides of 16 to 4096"),
        (_make_scans(3000), "a JPEG of at most 100 scans"),
    ],
    ids=["huge", "wide", "scans"],
)
def test_a_picture_is_refused_before_it_is_decoded(tmp_path, image, says):
    record = recordings.make_rlds_record(recordings.make_states(4), images=[image, _make_scans(1)] * 2)
    recordings.write_rlds(tmp_path, [record])
    (episode,) = open_episodes(tmp_path)
    with pytest.raises(DataError, match=says):
        episode.load_image(0)
    assert episode.load_image(1).shape == (32, 32, 3)


def _write_run(folder):
    writer = RunWriter(folder, {"model": "tiny"})
    for _ in range(2):
        writer.start_episode("robot")
        for step in range(4):
            line = {"robot": "robot", "step": step, "instruction": "go", "phrase": "stop", "time": 1.0 * step}
            state = np.array([0.3, 0, 0.1 + 0.02 * step, 0, 0, 0, 1])
            writer.add_step(line | {"proprio": state, "action": state}, np.zeros((32, 32, 3), np.uint8))
    writer.close()


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in (None, "0", 1.5, True, [])),
        *({"proprio": value} for value in ("x", [1.0], [[1.0] * 7], [1e300] * 7, [None] * 7, 5)),
        *({"action": value} for value in ("x", [1.0] * 8, [float("nan")] * 7)),
        *({name: [1]} for name in ("instruction", "phrase", "fault")),
        {"time": 1e300},
        {"time": "now"},
        None,
    ],
)
def test_a_step_with_fields_of_another_kind_is_reported_by_every_command(tmp_path, capsys, changes):
    run = tmp_path / "run"
    _write_run(run)
    steps = run / "episodes/robot-0/steps.jsonl"
    first, *others = steps.read_text().splitlines()
    first = json.dumps(None if changes is None else json.loads(first) | changes)
    steps.write_text("\n".join([first, *others]) + "\n")
    expected = 0 if changes and "time" in changes else 1
    status, said = _label(run, tmp_path, capsys)
    assert status == 0 and f"{expected} problem" in said and ("line 1" in said) == bool(expected)
    for command in (["runs", str(run)], ["replay", str(run), "--policy", "stop"]):
        assert main(command) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert f"{2 - expected} episodes" in capsys.readouterr().out


@pytest.mark.parametrize("meta", ["[]", DEEP, '{"seed": "x"}', '{"seed": -1}', '{"seed": 1.5}'])
def test_an_episode_whose_meta_is_no_description_is_reported(tmp_path, capsys, meta):
    _write_run(tmp_path / "run")
    (tmp_path / "run/episodes/robot-0/meta.json").write_text(meta)
    assert main(["replay", str(tmp_path / "run"), "--policy", "stop"]) == 0
    said = capsys.readouterr()
    assert "robot-0" in said.err and "left out" in said.err and "4 of 4 answers are the same" in said.out
