import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from vlm_local.data import open_episodes
from vlm_local.data.runs import RunWriter, read_run
from vlm_local.errors import DataError


def _line(robot="robot", step=0, **fields):
    proprio = np.array([0.3, 0, 0.1 + 0.02 * step, 0, 0, 0, 1])
    action = np.array([0, 0, 0.02, 0, 0, 0, 1])
    return {"robot": robot, "step": step, "phrase": "move up", "action": action, "proprio": proprio} | {
        "instruction": "lift the cup",
        "time": 1.5 * step,
        **fields,
    }


def _image(value: int) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 256, (32, 48, 3), np.uint8)


def _refuse(error: DataError):
    raise error


def test_what_was_written_is_read_back_without_loss(tmp_path):
    writer = RunWriter(tmp_path / "run", {"model": "tiny"})
    for robot in ("b", "a-1"):
        writer.start_episode(robot, {"seed": 7})
    for step in range(3):
        writer.add_step(_line("b", step), _image(step))
        writer.add_step(_line("a-1", step), _image(10 + step))
    writer.end_episode("b", {"success": True})
    writer.start_episode("b")
    writer.add_step(_line("b"), _image(0))
    writer.close()

    recorded = list(read_run(tmp_path / "run", _refuse))
    assert [(e.index, e.robot, e.meta["episode"], len(e.lines)) for e in recorded] == [
        (0, "a-1", 0, 3),
        (1, "b", 0, 3),
        (2, "b", 1, 1),
    ]
    assert recorded[1].meta == {"robot": "b", "episode": 0, "seed": 7, "success": True}
    np.testing.assert_array_equal(recorded[0].load_image(2), _image(12))
    assert json.loads((tmp_path / "run/meta.json").read_text()) == {"model": "tiny"}

    first = next(open_episodes(tmp_path / "run", None, _refuse))
    assert first.instruction == "lift the cup"
    np.testing.assert_allclose(first.states[:, 2], [0.1, 0.12, 0.14], rtol=1e-6)
    assert first.actions.shape == (3, 7) and first.states.dtype == np.float32


def test_an_existing_run_is_added_to(tmp_path):
    for _ in range(2):
        writer = RunWriter(tmp_path)
        writer.start_episode("robot")
        writer.add_step(_line(), _image(0))
        writer.close()
    assert [e.meta["episode"] for e in read_run(tmp_path, _refuse)] == [0, 1]


WRITE_FOREVER = """
import sys, numpy as np
from vlm_local.data.runs import RunWriter
writer = RunWriter(sys.argv[1])
writer.start_episode("robot")
step = 0
while True:
    line = {"robot": "robot", "step": step, "instruction": "x", "action": [0.0] * 7, "proprio": [0.0] * 7}
    writer.add_step(line, np.full((256, 256, 3), step % 256, np.uint8))
    step += 1
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_a_readable_run(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, tmp_path], stdout=subprocess.PIPE, text=True)
    for written in process.stdout:
        if int(written) == 25:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (episode,) = read_run(tmp_path, _refuse)
    assert len(episode.lines) >= 25
    assert [line["step"] for line in episode.lines] == list(range(len(episode.lines)))
    for step in range(len(episode.lines)):
        assert (episode.load_image(step) == step % 256).all()


def test_a_torn_last_line_is_reported_and_the_rest_is_read(tmp_path):
    writer = RunWriter(tmp_path)
    folder = writer.start_episode("robot")
    for step in range(3):
        writer.add_step(_line(step=step), _image(step))
    writer.close()
    text = (folder / "steps.jsonl").read_bytes()
    problems = []
    for cut in (1, 40):
        (folder / "steps.jsonl").write_bytes(text[:-cut])
        (episode,) = read_run(tmp_path, problems.append)
        assert len(episode.lines) == 2
    assert len(problems) == 2 and "cut off" in str(problems[0])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "steps.jsonl").write_text('{"a": 1}\n{"a\n{"a": 1}\n'), "line 2"),
        (lambda folder: (folder / "steps.jsonl").write_text(""), "no steps"),
        (lambda folder: (folder / "steps.jsonl").write_text('{"proprio": null}\n'), "no proprio"),
        (lambda folder: (folder / "steps.jsonl").write_text('{"proprio": [1, 2], "action": []}\n'), "7 numbers"),
        (lambda folder: (folder / "meta.json").unlink(), "meta.json"),
    ],
)
def test_a_damaged_episode_is_reported_and_the_next_is_read(tmp_path, damage, says):
    writer = RunWriter(tmp_path)
    folder = writer.start_episode("robot")
    writer.add_step(_line(), _image(0))
    writer.start_episode("robot")
    writer.add_step(_line(), _image(0))
    writer.close()
    damage(folder)
    problems = []
    assert [episode.index for episode in open_episodes(tmp_path, None, problems.append)] == [1]
    assert len(problems) == 1 and says in str(problems[0])


def test_a_frame_that_is_missing_broken_or_of_another_size_is_refused(tmp_path):
    writer = RunWriter(tmp_path)
    folder = writer.start_episode("robot")
    for step in range(4):
        writer.add_step(_line(step=step), _image(step) if step < 3 else np.zeros((64, 64, 3), np.uint8))
    writer.close()
    (folder / "frames/000001.png").write_bytes((folder / "frames/000001.png").read_bytes()[:90])
    (folder / "frames/000002.png").unlink()
    (episode,) = open_episodes(tmp_path, None, _refuse)
    episode.load_image(0)
    for step, says in ((1, "not a readable"), (2, "No such file"), (3, "mixed sizes")):
        with pytest.raises(DataError, match=says):
            episode.load_image(step)


def test_a_step_that_no_longer_fits_on_the_disk_leaves_nothing_behind(tmp_path):
    writer = RunWriter(tmp_path)
    folder = writer.start_episode("robot")
    small = np.zeros((16, 16, 3), np.uint8)
    writer.add_step(_line(step=0), small)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "steps.jsonl").stat().st_size + 50, limits[1]))
    try:  # the kernel takes 50 bytes of the next line and refuses the rest
        for step in (1, 2):
            with pytest.raises(OSError):
                writer.add_step(_line(step=step), small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert writer.add_step(_line(step=3), _image(3)) > 0
    (episode,) = read_run(tmp_path, _refuse)
    assert [line["step"] for line in episode.lines] == [0, 3]
    np.testing.assert_array_equal(episode.load_image(1), _image(3))


def test_steps_after_a_gap_are_left_out_and_counted(tmp_path):
    writer = RunWriter(tmp_path)
    writer.start_episode("robot")
    for step in (3, 4, 5, 7, 8):
        writer.add_step(_line(step=step), _image(step))
    writer.close()
    problems = []
    (episode,) = open_episodes(tmp_path, None, problems.append)
    assert len(episode) == 3
    assert "lost after step 5" in str(problems[0]) and "the 2 steps after it" in str(problems[0])
