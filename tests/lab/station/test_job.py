"""Around a job's steps: the scene is put back, a detector judges, a second station, a tunnel, a restart."""

import json
import time

import numpy as np
import pytest

from tests.lab.station.arms import start_arm
from tests.server.test_answers import serve_answers
from tests.serving import SteeredEngine, serve, until
from vlm_local.cli import main
from vlm_local.lab.station.scene import RESET_STEPS


def _play(url, out, task, *flags, steps=4):
    words = ["station", url, "--task", task, "--max-steps", str(steps), "--test-every", "0", "--out", str(out)]
    status = main([*words, *flags])
    lines = [json.loads(line) for line in (out / "station.jsonl").read_text().splitlines()]
    return status, json.loads((out / "report.json").read_text()), lines


class SlowEngine(SteeredEngine):
    def generate(self, requests):
        time.sleep(0.3)
        return super().generate(requests)


@pytest.mark.slow
def test_on_a_wall_clock_the_world_does_not_wait_for_an_answer(tmp_path):
    measured = {}
    with serve(SlowEngine()) as server:
        server.engine.phrase = "move forward, tilt up"
        for clock in ("step", "wall"):
            began = time.monotonic()
            _, report, lines = _play(
                server.url, tmp_path / clock, "eggplant_in_sink", "--clock", clock, "--episodes", "1"
            )
            seconds = time.monotonic() - began
            measured[clock] = np.array([line["sent"] for line in lines])
    assert seconds > 4.1 + 4 * 0.3 and report["steps_per_min"] < 60
    np.testing.assert_array_equal(measured["wall"][0], measured["step"][0])
    # While the answer was awaited the joints came to rest; the targets are the same.
    assert np.abs(measured["wall"][1:] - measured["step"][1:]).max() > 1e-6
    np.testing.assert_allclose(measured["wall"], measured["step"], atol=0.02)


def test_a_thing_falls_and_the_arm_stands_while_an_answer_is_awaited():
    env, arm = start_arm("eggplant_in_sink")
    before = arm.state
    env.world.put("eggplant", (0.35, 0.1, 0.3))
    env.world.wait(0.1)
    assert env.world.place("eggplant")[2] == pytest.approx(0.3 - 0.5 * 9.81 * 0.1**2, abs=0.005)
    np.testing.assert_allclose(arm.state[:3], before[:3], atol=1e-3)


@pytest.mark.slow
def test_a_tunnel_that_is_gone_ends_a_job_and_behind_the_relay_it_does_not(tmp_path):
    with serve() as server:
        flags = ("--episodes", "2", "--drop-tunnel", "1.5")
        status, bare, lines = _play(server.url, tmp_path / "bare", "close_drawer", *flags)
        assert (status, len(lines)) == (1, 8)
        assert "requests.exceptions.ConnectionError" in bare["would_have_ended"][0]["exception"]
        status, relayed, _ = _play(server.url, tmp_path / "relayed", "close_drawer", *flags, "--relay")
    assert (status, relayed["would_have_ended"]) == (0, [])
    assert relayed["answer_ms"]["max"] > 1000


@pytest.mark.slow
def test_two_stations_at_once_are_two_robots_with_an_episode_each(tmp_path):
    with serve() as server:
        status, report, _ = _play(
            server.url, tmp_path / "job", "close_drawer", "--episodes", "2", "--second-station", steps=5
        )
        server.newest_record()
    assert status == 0 and report["would_have_ended"] == []
    second = json.loads((tmp_path / "job" / "second" / "report.json").read_text())
    assert second["station"]["task"] == "eggplant_in_basket" and second["would_have_ended"] == []
    asked = {}
    for record in server.records:
        key = record.observation.instruction
        asked.setdefault(key, []).append((record.robot, record.about["episode"], record.about["step"]))
    assert set(asked) == {"close the drawer", "put the eggplant in the yellow basket"}
    assert {robot for steps in asked.values() for robot, _, _ in steps} == {"robot", "robot.2"}
    for steps in asked.values():
        assert len({robot for robot, _, _ in steps}) == 1
        assert [step[1:] for step in steps] == [(episode, step) for episode in range(2) for step in range(5)]


@pytest.mark.slow
def test_the_oracle_puts_the_scene_back_between_episodes(tmp_path):
    with serve() as server:
        server.engine.phrase = "stop"
        flags = ("--episodes", "2", "--reset-policy", "oracle")
        _, drawer, _ = _play(server.url, tmp_path / "drawer", "open_drawer", *flags)
        _, sink, _ = _play(server.url, tmp_path / "sink", "eggplant_in_sink", *flags)
    assert drawer["scene_resets"] == {"tries": 1, "persons_called": 0}  # always carried out
    assert sink["scene_resets"] == {"tries": 0, "persons_called": 0}  # the eggplant has not left the basket


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [10, pytest.param(110, marks=pytest.mark.long)])
def test_another_servers_policy_puts_the_scene_back(tmp_path, monkeypatch, num_steps):
    monkeypatch.setitem(RESET_STEPS, "drawer", num_steps)
    with serve() as server, serve() as idle:
        idle.engine.phrase = "stop"
        flags = ("--episodes", "2", "--reset-policy", idle.url)
        server.engine.phrase = "stop"
        # The drawer is open at the start and stays open: one try, after which the detector is content.
        _, report, _ = _play(server.url, tmp_path / "job", "close_drawer", *flags)
        idle.newest_record()
        asked = {record.observation.instruction for record in idle.records}
    assert report["scene_resets"] == {"tries": 1, "persons_called": 0}
    assert asked == {"open the drawer"} and len(idle.records) == num_steps


def test_a_detector_that_errs_is_told_from_the_truth(tmp_path):
    """The one behind this server takes a bright picture for an open drawer."""
    with serve() as server, serve_answers() as detector:
        server.engine.phrase = "stop"
        flags = ("--episodes", "2", "--detector", detector.url)
        status, report, _ = _play(server.url, tmp_path / "job", "open_drawer", *flags)
    assert status == 0 and report["truth"]["count"] == 0
    said = report["success"]["count"]
    assert report["confusion"] == {"both": 0, "detector alone": said, "truth alone": 0, "neither": 2 - said}
    folder = next((tmp_path / "job" / "auto_eval_log").iterdir())
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == ["0_img.png", "0_success.txt", "1_img.png", "1_success.txt"]
    assert [(folder / name).read_text() for name in kept[1::2]].count("True") == said
    assert "by the detector" in (tmp_path / "job" / "report.html").read_text()


def test_a_detector_that_is_not_there_would_have_ended_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_local.client.Detector.PAUSE_S", 0.0)
    with serve() as server:
        flags = ("--episodes", "1", "--detector", "http://127.0.0.1:9")
        status, report, _ = _play(server.url, tmp_path / "job", "open_drawer", *flags)
    assert status == 1 and [event["request"] for event in report["would_have_ended"]] == ["detector"]


@pytest.mark.slow
def test_a_command_runs_at_its_step_and_the_name_is_sent(tmp_path):
    mark = tmp_path / "ran"
    with serve() as server:
        flags = ("--episodes", "2", "--restart-at", "1:2", f"echo $$ > {mark}", "--name", "left")
        status, _, _ = _play(server.url, tmp_path / "job", "open_drawer", *flags)
        until(mark.exists)
        server.newest_record()
        assert status == 0 and {record.robot for record in server.records} == {"left"}


@pytest.mark.parametrize("words", [("x", "true"), ("1", "true"), ("1:2:3", "true")])
def test_where_to_restart_is_refused_with_what_is_expected(words, tmp_path, capsys):
    flags = ["--restart-at", *words, "--out", str(tmp_path / "job")]
    assert main(["station", "http://127.0.0.1:9", "--task", "open_drawer", *flags]) == 2
    assert "expected EPISODE:STEP" in capsys.readouterr().err


@pytest.mark.slow
def test_films_and_a_page_show_the_job(tmp_path):
    with serve() as server:
        _play(server.url, tmp_path / "job", "open_drawer", "--episodes", "2")
    page = (tmp_path / "job" / "report.html").read_text()
    for number in range(2):
        assert (tmp_path / "job" / "films" / f"episode-{number}.mp4").stat().st_size > 1000
        assert f'href="films/episode-{number}.mp4"' in page
    assert "<h1>A station's job: open drawer</h1>" in page
    assert "in truth" in page and "detector" not in page.partition("How it was made")[0].lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "phrase", "edge_m"),
    # The highest y of the drawer's box, 0.0770, lies 55 mm further left in our scene; the sink's lowest is a station's.
    [("open_drawer", "move left", 0.1320), ("eggplant_in_sink", "move right", -0.0985)],
)
def test_each_station_cuts_to_its_own_box(tmp_path, task, phrase, edge_m):
    with serve() as server:
        server.engine.phrase = phrase
        _, report, lines = _play(server.url, tmp_path / "job", task, "--episodes", "1", steps=12)
    assert pytest.approx(edge_m) in report["workspace_m"][1]
    targets = np.array([line["sent"][1] + line["executed"][1] for line in lines])
    assert np.abs(targets).max() == pytest.approx(abs(edge_m), abs=1e-6)
    assert lines[-1]["clipped"] and not lines[3]["clipped"]


def test_without_the_box_the_first_step_at_the_drawer_is_carried_out():
    _, arm = start_arm("open_drawer", has_box=False)
    executed = arm.act(np.array([0.0] * 6 + [1.0]))
    assert not executed.clipped and not executed.executed[:6].any()


def test_an_arm_that_meets_with_much_resistance_goes_back():
    _, arm = start_arm("open_drawer", has_box=False)
    steps = [arm.act(np.array([0.0, 0.0, -0.0125, 0.0, 0.0, 0.0, 0.0])) for _ in range(30)]  # into the table
    pushed = [step for step in steps if step.reversed]
    assert pushed and not steps[0].reversed
    assert pushed[0].executed[2] == pytest.approx(0.5 * 0.0125)
