import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from vlm_local.data.runs import RunWriter, read_run
from vlm_local.embodiments.frame import Sent
from vlm_local.errors import ConfigError
from vlm_local.server.episodes import Step
from vlm_local.server.recorder import Recorder
from vlm_local.server.records import Refusal, StepRecord, Subscription
from vlm_local.types import Decision, Observation
from vlm_local.wire import build_details

ACTION = np.array([0.0125, 0, 0, 0, 0, 0, 1])


def _record(step: int, robot: str = "robot", episode: int = 0, side: int = 32, proprio=None) -> StepRecord:
    image = np.random.default_rng(step).integers(0, 256, (side, side, 3), np.uint8)
    observation = Observation(image, "lift the cup", proprio)
    decision = Decision(ACTION, "move forward", timings_ms={"policy": 1.0}, extra={"cut": ["x"]})
    details = build_details(decision, model="tiny", robot=robot, episode=episode, step=step)
    answered = Step(episode, step, 7, "reset", observation, decision, Sent(ACTION, ACTION, "bridge"))
    return StepRecord(**vars(answered), time=100.0 + step, request_id="r1", robot=robot, details=details)


def _read(folder):
    def refuse(error):
        raise error

    return list(read_run(folder, refuse))


def test_what_is_recorded_is_what_was_answered(tmp_path):
    loaded = {}
    recorder = Recorder(tmp_path, lambda: loaded)
    loaded |= {"model": "tiny", "sha256": "abc"}
    proprio = np.array([0.3, 0, 0.1, 0, 0, 0, 1.0])
    for step in range(3):
        recorder(_record(step, "left", proprio=proprio))
        recorder(_record(step, "right", episode=5))
    recorder(_record(0, "left", episode=1))
    recorder.close()
    first, second, right = _read(tmp_path)
    assert (first.robot, len(first.lines), len(second.lines), right.robot) == ("left", 3, 1, "right")
    line = first.lines[2]
    sent = _record(2, "left")
    assert {name: line[name] for name in sent.details} == json.loads(json.dumps(sent.details))
    assert (line["time"], line["request_id"], line["instruction"]) == (102.0, "r1", "lift the cup")
    assert line["proprio"] == proprio.tolist() and right.lines[0]["proprio"] is None
    np.testing.assert_array_equal(first.load_image(2), sent.observation.image)
    assert first.meta["model"] == "tiny" and first.meta["seed"] == 7 and first.meta["started_by"] == "reset"
    assert json.loads((tmp_path / "meta.json").read_text()) == loaded
    assert right.meta["server_episode"] == 5 and right.meta["episode"] == 0
    assert recorder.stats()["written"] == 7 and recorder.stats()["lost"] == 0


def test_refusals_are_written_beside_the_episodes(tmp_path):
    recorder = Recorder(tmp_path, dict)
    recorder(Refusal(1.0, "r2", "robot", "/act", 503, "the model is stuck"))
    (line,) = (tmp_path / "refusals.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "the model is stuck"
    assert not _read(tmp_path)


def test_refusals_on_disk_are_the_newest_and_not_more_than_some_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_local.data.runs.MAX_REFUSAL_BYTES", 2000)
    recorder = Recorder(tmp_path, dict)
    for number in range(50):
        recorder(Refusal(float(number), "r2", "robot", "/act", 400, f"{number} " + 10_000 * "x"))
    files = [tmp_path / name for name in ("refusals.old.jsonl", "refusals.jsonl")]
    times = [json.loads(line)["time"] for file in files if file.exists() for line in file.read_text().splitlines()]
    assert times == list(range(50 - len(times), 50)) and 2 <= len(times) <= 8
    assert sum(file.stat().st_size for file in tmp_path.glob("refusals*")) < 7000


def test_a_full_disk_loses_steps_that_are_counted_and_recording_goes_on_after_it(tmp_path, caplog):
    told = {"model": None}
    recorder = Recorder(tmp_path, lambda: told)
    recorder(_record(0))
    told = {"model": "tiny" * 20}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:  # neither a frame nor a new episode's meta.json fits
        for step in range(1, 6):
            recorder(_record(step))
        recorder(_record(0, "other"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stats = recorder.stats()
    assert (stats["written"], stats["lost"]) == (1, 6) and "too large" in stats["error"]
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text  # not one a step
    recorder(_record(6))
    assert "goes on; 6 steps were lost" in caplog.text
    recorder(_record(1, "other"))
    assert recorder.stats()["error"] is None
    recorder.close()
    assert json.loads((tmp_path / "meta.json").read_bytes()) == told
    other, robot = _read(tmp_path)
    assert [line["step"] for line in robot.lines] == [0, 6]
    assert [line["step"] for line in other.lines] == [1]
    np.testing.assert_array_equal(robot.load_image(1), _record(6).observation.image)


def test_a_refusal_that_does_not_fit_is_no_lost_step(tmp_path):
    recorder = Recorder(tmp_path, dict)
    (tmp_path / "refusals.jsonl").mkdir()
    recorder(Refusal(1.0, "r2", "robot", "/act", 503, "the model is stuck"))
    assert recorder.stats()["lost"] == 0 and "refusals.jsonl" in recorder.stats()["error"]


@pytest.mark.parametrize("removed", [".", "run", "run/episodes", "run/episodes/left-0", "run/episodes/left-0/frames"])
def test_folders_that_are_removed_while_serving_are_made_anew(tmp_path, removed):
    run = tmp_path / "runs" / "run"
    recorder = Recorder(run, lambda: {"model": "tiny"})
    recorder(_record(0, "left"))
    recorder(_record(0, "right"))
    shutil.rmtree(tmp_path / "runs" / removed)
    for step in range(1, 3):
        recorder(_record(step, "left"))
        recorder(_record(step, "right"))
    stats = recorder.stats()
    assert (stats["written"], stats["lost"], stats["error"]) == (6, 0, None)
    with pytest.raises(ConfigError, match="in use by another process"):
        Recorder(run, dict)  # nor does another server take it for the run of one that has ended
    assert json.loads((run / "meta.json").read_text()) == {"model": "tiny"}
    recorder.close()
    episodes = list(read_run(run, lambda problem: None))  # left-0 may have lost its frames
    assert sum(line["step"] > 0 for episode in episodes for line in episode.lines) == 4
    image = episodes[-1].load_image(len(episodes[-1].lines) - 1)
    np.testing.assert_array_equal(image, _record(2).observation.image)


def test_a_run_on_a_disk_that_went_away_and_came_back_is_gone_on_with(tmp_path, caplog):
    run = tmp_path / "runs" / "run"
    recorder = Recorder(run, dict)
    recorder(_record(0))
    run.parent.rename(tmp_path / "away")
    (tmp_path / "runs").touch()  # where no folder can be made, also by root
    for step in range(1, 4):
        recorder(_record(step))
    assert recorder.stats()["lost"] == 3 and len(caplog.records) == 1
    (tmp_path / "runs").unlink()
    (tmp_path / "away").rename(run.parent)
    recorder(_record(4))
    recorder.close()
    assert [line["step"] for episode in _read(run) for line in episode.lines] == [0, 4]


def test_a_copy_in_the_place_of_the_run_is_no_other_servers_either(tmp_path):
    recorder = Recorder(tmp_path / "run", dict)
    recorder(_record(0))
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "run")
    recorder(_record(0, episode=1))
    with pytest.raises(ConfigError, match="in use by another process"):
        Recorder(tmp_path / "run", dict)
    recorder.close()
    assert len(_read(tmp_path / "run")) == 2


def test_above_the_cap_the_oldest_ended_episodes_go(tmp_path):
    Recorder(tmp_path, dict)(_record(0, "old"))
    os.utime(tmp_path / "episodes/old-0", (1, 1))
    size = sum(file.stat().st_size for file in (tmp_path / "episodes").rglob("*") if file.is_file())
    recorder = Recorder(tmp_path, dict, max_bytes=4 * size)
    for episode in range(5):
        for step in range(2):
            recorder(_record(step, episode=episode))
    recorder.close()
    names = sorted(folder.name for folder in (tmp_path / "episodes").iterdir())
    assert "old-0" not in names and "robot-0" not in names and "robot-4" in names
    assert recorder.stats()["deleted_episodes"] == 6 - len(names)
    kept = sum(file.stat().st_size for file in (tmp_path / "episodes").rglob("*") if file.is_file())
    assert kept <= 6 * size


def test_robots_that_went_away_do_not_keep_the_oldest_episodes(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_local.server.recorder._MAX_OPEN", 3)
    recorder = Recorder(tmp_path, dict, max_bytes=1)
    for number in range(8):
        recorder(_record(number, f"guest{number}"))
        recorder(_record(number, "stays"))
    recorder.close()
    assert sorted(folder.name for folder in (tmp_path / "episodes").iterdir()) == ["guest6-0", "guest7-0", "stays-0"]
    assert [line["step"] for line in _read(tmp_path)[-1].lines] == list(range(8))
    assert recorder.stats()["lost"] == 0  # where none can be deleted


def test_after_a_restart_the_oldest_episodes_go_first(tmp_path):
    recorder = Recorder(tmp_path, dict)
    for name in ("newer", "older"):
        recorder(_record(0, name))
    recorder.close()
    os.utime(tmp_path / "episodes/older-0", (1, 1))
    size = sum(file.stat().st_size for file in (tmp_path / "episodes").rglob("*") if file.is_file())
    recorder = Recorder(tmp_path, dict, max_bytes=size)
    recorder(_record(0, "now"))
    recorder.close()
    assert {folder.name for folder in (tmp_path / "episodes").iterdir()} == {"newer-0", "now-0"}


RECORD_FOREVER = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.server.test_recorder import Subscription, Recorder, _record
outlet = Subscription(Recorder(sys.argv[1], dict))
for step in range(10**6):
    outlet.put(_record(step, side=128))
    print(step, flush=True)
    while outlet.num_waiting > 8: pass
"""


def test_after_kill_9_every_step_but_those_in_the_queue_is_readable(tmp_path):
    command = [sys.executable, "-c", RECORD_FOREVER, tmp_path, os.path.dirname(__file__)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == 60:
            break
    os.kill(process.pid, signal.SIGKILL)
    answered = 60 + len(process.stdout.read().splitlines())
    process.wait()
    (episode,) = _read(tmp_path)
    assert len(episode.lines) >= answered - 10
    assert [line["step"] for line in episode.lines] == list(range(len(episode.lines)))
    for step in (0, len(episode.lines) - 1):
        np.testing.assert_array_equal(episode.load_image(step), _record(step, side=128).observation.image)


def test_a_disk_that_hangs_never_holds_up_who_hands_over_a_record(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path, dict)
    hanging = threading.Event()
    monkeypatch.setattr(recorder._writer, "add_step", lambda line, image: hanging.wait(60))
    outlet = Subscription(recorder, max_bytes=30_000)
    for step in range(50):
        outlet.put(_record(step))
    assert recorder.stats()["written"] == 0  # the first is still being written
    assert outlet.num_dropped >= 44
    hanging.set()
    assert outlet.close(60)
    assert recorder.stats()["written"] + outlet.num_dropped == 50


def test_a_record_that_its_subscriber_could_not_take_is_counted_and_the_next_is_delivered():
    taken = []
    outlet = Subscription(lambda record: taken.append(record) if record.step else 1 / 0)
    for step in range(3):
        outlet.put(_record(step))
    assert outlet.close(60)
    assert outlet.num_dropped == 1 and [record.step for record in taken] == [1, 2]


def test_a_folder_that_is_recorded_into_is_refused_and_no_episode_is_taken_over(tmp_path):
    recorder = Recorder(tmp_path, dict)
    with pytest.raises(ConfigError, match="in use by another process"):
        Recorder(tmp_path, dict)
    recorder(_record(0))
    other = RunWriter(tmp_path)  # of a program that does not ask for the lock
    assert other.start_episode("robot").name == "robot-1"
    with pytest.raises(FileExistsError):
        other.start_episode("robot", number=0)
    assert len(_read(tmp_path)[0].lines) == 1
    recorder.close()
    Recorder(tmp_path, dict).close()


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--record"):
        Recorder(tmp_path / "file", dict)
