import json

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_local.cli import main
from vlm_local.data import open_episodes
from vlm_local.data.film import draw_step, write_film, write_gif
from vlm_local.data.runs import RunWriter, read_run
from vlm_local.data.summary import list_runs, summarise_run
from vlm_local.errors import DataError

PHRASES = ("move forward", "move up, close gripper", None)


def _line(robot, step, **more):
    fault = "out of memory" if PHRASES[step % 3] is None else None
    action = [0.0125, 0, -0.0125, 0, 0, 0, float(step % 2)]
    proprio = [0.3, 0.01 * step, 0.1, 0, 0, 0, 1.0]
    line = {"robot": robot, "episode": 0, "step": step, "phrase": PHRASES[step % 3], "fault": fault}
    return line | {"time": 1000.0 + step / 5, "action": action, "proprio": proprio, "instruction": "lift"} | more


def _image(step: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 256, (side, side, 3), np.uint8)


@pytest.fixture
def run(tmp_path):
    """A run: left-0 of 5 steps, left-1 without proprio, right-0 of 3 steps, wide-0 of another size."""
    folder = tmp_path / "runs" / "20260101-120000-tiny"
    writer = RunWriter(folder, {"model": "tiny"})
    for robot, length, side, more in (
        ("left", 5, 64, {}),
        ("left", 2, 64, {"proprio": None}),
        ("right", 3, 64, {"instruction": "open the drawer"}),
        ("wide", 2, 80, {"instruction": "fold the cloth"}),
    ):
        writer.start_episode(robot)
        for step in range(length):
            writer.add_step(_line(robot, step, **more), _image(step, side))
    writer.close()
    return folder


def test_runs_are_listed_with_what_went_wrong(run, capsys):
    (run / "episodes/right-0/steps.jsonl").open("a").write('{"torn')
    assert list_runs(run.parent) == [run] == list_runs(run)
    found = {episode.id: episode for episode in summarise_run(run)}
    assert (found["left-0"].num_steps, found["left-0"].num_faults) == (5, 1)
    assert found["left-0"].duration_s == pytest.approx(0.8) and found["left-0"].started == 1000
    assert found["right-0"].num_steps == 3 and "cut off" in found["right-0"].problem
    assert main(["runs", str(run.parent)]) == 0
    text = capsys.readouterr().out
    assert "model tiny, 4 episodes" in text and "open the drawer" in text and "cut off" in text


def test_a_summary_follows_an_episode_that_grows(tmp_path):
    writer = RunWriter(tmp_path)
    writer.start_episode("left")
    for step in range(3):
        writer.add_step(_line("left", step), _image(step))
        assert next(summarise_run(tmp_path)).num_steps == step + 1


@pytest.mark.slow
def test_a_long_list_reads_no_episode_that_has_ended_twice(tmp_path, monkeypatch):
    for number in range(5000):  # a month of two robots
        (tmp_path / "episodes" / f"left-{number}").mkdir(parents=True)
        (tmp_path / "episodes" / f"left-{number}" / "steps.jsonl").touch()
    assert sum(1 for _ in summarise_run(tmp_path)) == 5000
    monkeypatch.setattr("vlm_local.data.summary.read_steps", lambda *_: pytest.fail("it was read again"))
    assert sum(1 for _ in summarise_run(tmp_path)) == 5000


def test_an_export_reads_back_as_it_was(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "2 episodes (8 frames)" in printed.out and "4 films" in printed.out
    assert "proprio" in printed.err and "(80, 80, 3)" in printed.err
    first, second = open_episodes(tmp_path / "out/lerobot")
    assert (first.instruction, second.instruction) == ("lift", "open the drawer")
    lines = [_line("left", step) for step in range(5)]
    np.testing.assert_array_equal(first.states, np.array([line["proprio"] for line in lines], np.float32))
    np.testing.assert_array_equal(first.actions, np.array([line["action"] for line in lines], np.float32))
    for step in range(5):
        np.testing.assert_array_equal(first.load_image(step), _image(step))
    assert len(second) == 3


def test_the_data_set_has_what_lerobot_reads(run, tmp_path):
    """Names and types as LeRobot 0.4's own loader wants them; it read such a data set when this was written."""
    main(["export", str(run), "--out", str(tmp_path / "out")])
    folder = tmp_path / "out/lerobot"
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["total_episodes"] == 2 and info["total_frames"] == 8
    assert info["features"]["observation.images.camera"]["shape"] == [64, 64, 3]
    table = pq.read_table(folder / info["data_path"].format(chunk_index=0, file_index=1))
    assert set(table.column_names) == set(info["features"]) and info["total_tasks"] == 2
    assert table["index"].to_pylist() == [5, 6, 7] and table["frame_index"].to_pylist() == [0, 1, 2]
    assert table["timestamp"].to_pylist() == pytest.approx([0, 0.2, 0.4])
    assert table["phrase"].to_pylist() == ["move forward", "move up, close gripper", ""]
    (row,) = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").slice(1).to_pylist()
    assert (row["dataset_from_index"], row["dataset_to_index"], row["tasks"]) == (5, 8, ["open the drawer"])
    tasks = pq.read_table(folder / "meta/tasks.parquet")
    assert tasks["__index_level_0__"].to_pylist() == ["lift", "open the drawer"]
    assert b"__index_level_0__" in tasks.schema.metadata[b"pandas"]
    stats = json.loads((folder / "meta/stats.json").read_text())
    assert stats["action"]["count"] == [8] and stats["action"]["mean"][0] == pytest.approx(0.0125)
    assert np.shape(stats["observation.images.camera"]["std"]) == (3, 1, 1)
    assert stats["observation.images.camera"]["std"][0][0][0] == pytest.approx(0.289, abs=0.01)  # of uniform noise


def test_an_export_never_writes_into_an_older_one(run, tmp_path, capsys):
    (tmp_path / "out/lerobot").mkdir(parents=True)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["export", str(run.parent / "nothing"), "--out", str(tmp_path / "other")]) == 2


def test_a_film_has_a_frame_a_step_and_shows_the_picture(run, tmp_path):
    episode = next(read_run(run, pytest.fail))
    steps = [(np.full((64, 64, 3), 40 * step, np.uint8), line) for step, line in enumerate(episode.lines)]
    assert write_film(tmp_path / "film.mp4", steps) == 5
    with av.open(str(tmp_path / "film.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 5
    assert len(frames) == 5 and frames[0].shape[1] == 640
    for step, frame in enumerate(frames):
        assert abs(int(frame[320, 320, 0]) - 40 * step) < 6


@pytest.mark.slow
def test_what_was_said_and_done_changes_the_panel():
    image = np.zeros((64, 64, 3), np.uint8)
    panels = [draw_step(image, _line("left", step))[640:] for step in range(3)]
    assert panels[0].shape[0] > 100
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (panels[one] != panels[other]).any()
    long = _line("left", 0, instruction="put " * 500, phrase=None, fault="memory " * 500)
    assert draw_step(image, long).shape == draw_step(image, _line("left", 0)).shape


def test_bars_point_the_way_of_the_words():
    def measure(**action):
        line = _line("left", 0) | {
            "meant": None,
            "action": [action.get(axis, 0.0) for axis in ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]],
        }
        panel = draw_step(np.zeros((64, 64, 3), np.uint8), line)[-60:].astype(int)
        return np.flatnonzero((panel == (107, 160, 255)).all(axis=2).any(axis=0))

    def is_left(axis, value):
        bar = measure(**{axis: value})
        return bar.mean() < measure(**{axis: -value}).mean()

    assert is_left("y", 0.0125) and is_left("yaw", 0.125)  # left, counterclockwise
    assert is_left("x", -0.0125) and is_left("z", -0.0125) and is_left("pitch", -0.125)


def test_a_gif_keeps_the_colours_of_small_things_and_words(tmp_path):
    """Beside a table in many browns, of which a palette of the commonest colours would consist."""
    shades = np.linspace(0, 1, 256)
    table = 60 + 120 * (0.5 * shades[:, None, None] + 0.5 * shades[None, :, None]) * np.array([1.0, 0.75, 0.5])
    image = table.astype(np.uint8)
    colours = {"block": (20, 170, 50), "eggplant": (80, 30, 140)}
    for place, colour in zip((40, 120), colours.values(), strict=True):
        image[place : place + 10, place : place + 10] = colour
    steps = [(image, _line("left", step)) for step in range(3)] + [(image, {"instruction": "go", "outcome": "success"})]
    write_gif(tmp_path / "film.gif", steps)
    with Image.open(tmp_path / "film.gif") as gif:
        gif.seek(gif.n_frames - 1)
        shown = np.asarray(gif.convert("RGB"), int).reshape(-1, 3)
    for colour in (*colours.values(), (76, 199, 154)):  # the last one is that of "success"
        assert np.abs(shown - colour).max(axis=1).min() < 25, colour


def test_a_film_of_odd_sides_is_encoded(tmp_path):
    assert write_film(tmp_path / "odd.mp4", [(np.zeros((51, 77, 3), np.uint8), _line("left", 0))]) == 1


def test_a_missing_frame_is_reported_and_the_other_films_made(run, tmp_path, capsys):
    (run / "episodes/left-0/frames/000002.png").unlink()
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "000002.png" in capsys.readouterr().err
    assert (tmp_path / "out/films/right-0.mp4").stat().st_size > 500


def test_a_folder_without_runs_says_so(tmp_path):
    assert main(["runs", str(tmp_path)]) == 2
    with pytest.raises(DataError):
        next(open_episodes(tmp_path))
