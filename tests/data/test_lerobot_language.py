"""`label --write`: a copy of a LeRobot v3 data set with phrases in its language column."""

import json
import shutil
from itertools import groupby, pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import recordings
from vlm_local.cli import main
from vlm_local.data import open_episodes

LENGTHS = (7, 40, 5)


def _write(folder, version="v3.0", images="image"):
    recordings.write_lerobot(folder, [recordings.make_states(length, length) for length in LENGTHS], version, images)
    return folder


def _read(folder):
    """Every frame's row: episode_index, timestamp, language_persistent, language_events."""
    files = sorted(folder.glob("data/*/*.parquet"))
    names = ["episode_index", "timestamp", "language_persistent", "language_events"]
    return [row for file in files for row in pq.read_table(file, columns=names).to_pylist()]


@pytest.mark.parametrize("images", ["video", "image"])
def test_every_frame_holds_its_episodes_phrases_from_when_each_begins(tmp_path, images):
    source = _write(tmp_path / "source", images=images)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    copy, labels = tmp_path / "copy", tmp_path / "labels.jsonl"
    assert main(["label", str(source), "--out", str(labels), "--write", str(copy)]) == 0
    said = [json.loads(line) for line in labels.read_text().splitlines()]
    frames = _read(copy)
    assert len(frames) == len(said) == sum(LENGTHS)
    for frame, label in zip(frames, said, strict=True):
        rows = frame["language_persistent"]
        assert {(row["role"], row["style"], row["camera"], row["tool_calls"]) for row in rows} == {
            ("assistant", "motion", None, None)
        }
        held = [row["content"] for row in rows if row["timestamp"] <= frame["timestamp"]]
        assert held[-1] == label["phrase"] and frame["language_events"] == []
    for _, group in groupby(frames, key=lambda frame: frame["episode_index"]):
        rows = [frame["language_persistent"] for frame in group]
        assert all(each == rows[0] for each in rows)
        phrases = [row["content"] for row in rows[0]]
        assert all(a != b for a, b in pairwise(phrases))
    language = {"dtype": "language", "shape": [1], "names": None}
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    assert features["language_persistent"] == features["language_events"] == language
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    for old, new in zip(open_episodes(source), open_episodes(copy), strict=True):
        assert (old.states == new.states).all() and (old.load_image(3) == new.load_image(3)).all()


def test_written_again_phrases_are_replaced_and_other_styles_stay(tmp_path):
    source, first, second = _write(tmp_path / "source"), tmp_path / "first", tmp_path / "second"
    assert main(["label", str(source), "--write", str(first)]) == 0
    (file, *_) = sorted(first.glob("data/*/*.parquet"))
    table = pq.read_table(file)
    plan = {"role": "assistant", "content": "grasp", "style": "plan", "timestamp": 0.0, "camera": None}
    cells = [[{**plan, "tool_calls": None}, *rows] for rows in table["language_persistent"].to_pylist()]
    at = table.column_names.index("language_persistent")
    pq.write_table(table.set_column(at, "language_persistent", pa.array(cells)), file)
    assert main(["label", str(first), "--write", str(second)]) == 0
    frames = _read(second)
    assert [row["style"] for row in frames[0]["language_persistent"]].count("plan") == 1
    motions = [[row for row in frame["language_persistent"] if row["style"] == "motion"] for frame in frames]
    assert motions == [
        [row for row in frame["language_persistent"] if row["style"] == "motion"] for frame in _read(first)
    ]


@pytest.mark.parametrize(
    ("version", "target", "says"),
    [
        ("v2.1", "copy", "older than LeRobot v3"),
        ("v3.0", "source/copy", "never written to"),
        ("v3.0", "there", "exists; name another folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(tmp_path, capsys, version, target, says):
    source = _write(tmp_path / "source", version)
    (tmp_path / "there").mkdir()
    assert main(["label", str(source), "--out", str(tmp_path / "rows"), "--write", str(tmp_path / target)]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "rows").exists()


def test_another_format_and_no_target_are_refused(tmp_path, capsys):
    recordings.write_walks(tmp_path / "rlds", 1, num_steps=10)
    assert main(["label", str(tmp_path / "rlds"), "--write", str(tmp_path / "copy")]) == 2
    assert "is no LeRobot data set" in capsys.readouterr().err
    assert main(["label", str(tmp_path / "rlds")]) == 2
    assert "--out F.jsonl, --write DIR or both" in capsys.readouterr().err


def test_a_table_that_disagrees_leaves_no_half_copy(tmp_path, capsys):
    source = _write(tmp_path / "source")
    assert main(["label", str(source), "--split", "nowhere", "--write", str(tmp_path / "copy")]) == 2
    file = sorted(source.glob("data/*/*.parquet"))[0]
    shutil.copy(file, file.with_name("file-999.parquet"))  # its frames twice
    assert main(["label", str(source), "--write", str(tmp_path / "copy")]) == 2
    assert "frames in the tables" in capsys.readouterr().err and not (tmp_path / "copy").exists()
