"""The twin of a station against real servers, over HTTP."""

import json
from contextlib import closing

import numpy as np
import pytest

from tests.embodiments.station import to_bridge
from tests.lab.station.arms import start_arm
from tests.serving import serve
from tests.slow import slow
from vlm_local.cli import main
from vlm_local.data import open_data_set
from vlm_local.embodiments import load_embodiment
from vlm_local.errors import EngineError
from vlm_local.lab.station.camera import StationCamera
from vlm_local.server.access import Gate
from vlm_local.server.service import ServerSettings
from vlm_local.sim.environment import SimEnv

TURNS = {
    "tilt up": (0, 0.125, 0),
    "tilt down": (0, -0.125, 0),
    "rotate counterclockwise": (0, 0, 0.125),
    "rotate clockwise": (0, 0, -0.125),
}


def _station(url, out, *flags):
    return main(["station", url, "--task", "eggplant_in_basket", "--out", str(out), *flags])


def _read_lines(out):
    return [json.loads(line) for line in (out / "station.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("phrase", ["tilt up", "rotate clockwise", slow("tilt down"), slow("rotate counterclockwise")])
def test_a_constant_phrase_turns_the_simulated_gripper_about_its_axis(phrase, tmp_path):
    with serve() as server:
        server.engine.phrase = phrase
        assert _station(server.url, tmp_path / "job", "--episodes", "1", "--max-steps", "4") == 0
        measured = [record.observation.proprio[3:6] for record in server.records]
    commanded = [to_bridge(line["commanded"]) for line in _read_lines(tmp_path / "job")]
    np.testing.assert_allclose(np.diff(commanded, axis=0), [TURNS[phrase]] * 3, atol=1e-6)
    # The joints lag behind while they start.
    np.testing.assert_allclose(np.diff(measured, axis=0)[1:], [TURNS[phrase]] * 2, atol=0.02)


@pytest.mark.slow
def test_the_result_of_a_server_with_a_token_does_not_hold_the_token(tmp_path, capsys):
    with serve(settings=ServerSettings(gate=Gate("verysecret1"))) as server:
        url = f"{server.url}/t/verysecret1"
        job = ["--episodes", "1", "--max-steps", "2", "--restart-at", "0:0", f"true {url}", "--detector", url]
        assert _station(url, tmp_path / "job", *job) in (0, 1)
    printed = capsys.readouterr()
    assert "/t/***" in printed.out and "verysecret1" not in printed.out + printed.err
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"verysecret1" in file.read_bytes()]


def test_without_the_frame_the_same_twin_tilts_to_and_fro(tmp_path):
    with serve(settings=ServerSettings(embodiment="bridge-widowx")) as server:
        server.engine.phrase = "tilt up"
        assert _station(server.url, tmp_path / "job", "--episodes", "1", "--max-steps", "5", "--test-every", "0") == 0
    tilted = [np.array(line["commanded"]) for line in _read_lines(tmp_path / "job")]
    bridge = [round(abs(angles[1] - np.pi / 2), 3) for angles in tilted]
    assert bridge == [0.125, 0.0, 0.125, 0.0, 0.125]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_job(tmp_path):
    with serve() as server:
        for name in ("first", "second"):
            assert _station(server.url, tmp_path / name, "--episodes", "2", "--max-steps", "3") == 0
    first, second = ([{**line, "ms": 0} for line in _read_lines(tmp_path / name)] for name in ("first", "second"))
    assert first == second and len(first) == 6


def test_its_files_are_those_of_autoevals_logger(tmp_path):
    with serve() as server:
        server.engine.phrase = "move forward"
        assert _station(server.url, tmp_path / "job", "--episodes", "2", "--max-steps", "6") == 0
    episodes = list(open_data_set(tmp_path / "job" / "eval_data").episodes)
    assert [(len(episode), episode.success) for episode in episodes] == [(5, False)] * 2
    lines = _read_lines(tmp_path / "job")
    np.testing.assert_allclose(episodes[0].states[0, :3], lines[1]["sent"][:3], atol=1e-6)
    np.testing.assert_allclose(episodes[0].actions[0], lines[1]["action"], atol=1e-6)
    assert np.abs(episodes[0].states[:, 3:6]).max() < 0.1  # measured from the gripper pointing down


def test_the_policy_sees_what_a_camera_and_its_jpeg_leave_of_the_scene(tmp_path):
    """The scene of the simulator's own picture, whole, with a camera's pixels and JPEG's marks."""
    plain = SimEnv("eggplant_in_sink")
    plain.reset(seed=0)
    with closing(plain), closing(StationCamera(plain.world)) as camera:
        seen, clean = (image.astype(int) for image in (camera.take(), plain.render()))
    assert seen.shape == (256, 256, 3)
    assert 0.3 < np.abs(seen - clean).mean() < 3
    moved = [np.abs(np.roll(seen, shift, axis) - clean).mean() for axis in (0, 1) for shift in (-2, 2)]
    assert min(moved) > 2 * np.abs(seen - clean).mean()  # neither shifted nor stretched


def test_a_silent_tunnel_costs_time_and_no_job(tmp_path):
    with serve() as server:
        flags = ("--episodes", "1", "--max-steps", "4", "--drop-tunnel", "1")
        assert _station(server.url, tmp_path / "job", *flags) == 0
    report = json.loads((tmp_path / "job" / "report.json").read_text())
    assert report["answer_ms"]["max"] > 700


def test_what_would_have_ended_the_job_is_told_and_the_job_goes_on(tmp_path, capsys):
    with serve(settings=ServerSettings(on_fault="error")) as server:
        plain = server.engine.generate

        def fail_once(requests):
            if len(server.records) == 2:
                server.records.append(None)
                raise EngineError("out of memory")
            return plain(requests)

        server.engine.generate = fail_once
        assert _station(server.url, tmp_path / "job", "--episodes", "1", "--max-steps", "6", "--test-every", "0") == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["would_have_ended"]
    assert [event["request"] for event in told] == ["/act"] and "out of memory" in told[0]["exception"]


def test_a_server_that_is_not_there_is_refused_as_the_form_would(tmp_path, capsys):
    assert _station("http://127.0.0.1:9", tmp_path / "job") == 2
    assert "the form would not take this address" in capsys.readouterr().err


def test_the_first_step_at_the_drawer_goes_down_into_its_box_whatever_is_answered():
    _, arm = start_arm("open_drawer")
    before = arm.state
    executed = arm.act(np.array([0.0] * 6 + [1.0]))
    assert executed.executed[2] == pytest.approx(0.1637 - before[2], abs=1e-6) and executed.clipped


def test_the_reset_pose_is_measured_as_it_was_recorded_at_a_station():
    _, arm = start_arm("eggplant_in_sink")
    reset = np.array(load_embodiment("autoeval-widowx").reset_pose)
    np.testing.assert_allclose(arm.state[:3], reset[:3] + np.array([-0.010025, 0, -0.01005]), atol=0.004)
    np.testing.assert_allclose(arm.state[4], 1.5416, atol=0.01)
