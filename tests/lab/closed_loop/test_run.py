"""Runs: what they leave behind, how they go on, and what a bad server does to them."""

import json
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache

import numpy as np
import pytest
from PIL import Image

from tests import serving
from tests.slow import slow
from tests.test_client import ForeignServer
from vlm_local.actions import StepTable, build_action
from vlm_local.assembly import open_policies
from vlm_local.cli import main
from vlm_local.data import open_episodes
from vlm_local.engines.scripted import build_uniform_engine
from vlm_local.files import lock_folder
from vlm_local.policy_options import PolicyOptions
from vlm_local.primitives import parse_phrase
from vlm_local.server.app import create_app
from vlm_local.server.serve import HTTPServer, bind
from vlm_local.server.service import ServerSettings


def run_sim(capsys, out, *arguments) -> dict:
    """The command's last line of output."""
    assert main(["sim", "--out", str(out), "--films", "0", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def read_lines(out, episode: str) -> list[dict]:
    return [json.loads(line) for line in (out / "episodes" / episode / "steps.jsonl").read_text().splitlines()]


def read_gripper_word(film, frame: int) -> np.ndarray:
    """The pixels of "open" or "closed" in the panel below the picture, 320 wide."""
    film.seek(frame)
    return np.asarray(film.convert("L"), float)[371:385, 266:318]


def test_a_run_of_the_oracle(tmp_path, capsys):
    arguments = ("--policy", "oracle", "--task", "reach,open_drawer", "--episodes", 1, "--workers", 1, "--seed", 40)
    out = tmp_path / "run"
    summary = run_sim(capsys, out, *arguments)
    assert summary["success_rate"] == {"reach": 1.0, "open_drawer": 1.0}
    assert (summary["episodes"], summary["faulted"]) == (2, 0)
    lines = read_lines(out, "reach-0")
    assert all(line["phrase"] == line["oracle"] for line in lines)
    episodes = list(open_episodes(out))
    assert {len(episode) for episode in episodes} == {len(lines), len(read_lines(out, "open_drawer-0"))}
    report = json.loads((out / "report.json").read_text())
    assert report["tasks"]["reach"]["efficiency"] == 1.0
    assert report["tasks"]["open_drawer"]["reached"] == {"reached": 1, "opened": 1}
    page = (out / "report.html").read_text()
    assert "random phrases on the first 1 of them" in page  # not on all: they take long to fail
    board = tmp_path / "leaderboard.md"
    assert main(["leaderboard", str(out), "--out", str(board)]) == 0
    assert "| oracle | - | 40 to 40 | 100.0 %" in board.read_text()


@pytest.mark.slow
def test_films_of_a_run(tmp_path):
    out = tmp_path / "run"
    flags = ["--policy", "oracle", "--task", "reach", "--episodes", "1", "--workers", "1", "--seed", "40"]
    assert main(["sim", "--out", str(out), "--films", "1", "--gif", *flags]) == 0
    [episode] = open_episodes(out)
    assert episode.load_image(0).shape == (256, 256, 3)
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "episodes/reach-0/film.mp4").exists()
    with Image.open(out / "episodes/reach-0/film.gif") as film:
        last_step = read_gripper_word(film, film.n_frames - 6)  # before the five of what came of it
        assert np.abs(read_gripper_word(film, film.n_frames - 1) - last_step).mean() < 4  # of "closed" it is 9


def test_a_run_that_another_process_plays_is_left_alone(tmp_path, capsys):
    arguments = ("--policy", "move left", "--task", "lift", "--max-steps", 2, "--workers", 1)
    run_sim(capsys, tmp_path, *arguments, "--episodes", 1)
    (tmp_path / "episodes/lift-0/meta.json").write_text("{}")  # being played
    with lock_folder(tmp_path):
        command = ["sim", "--out", str(tmp_path), *map(str, arguments), "--episodes", "1"]
        assert main(command) == 2
    assert "in use by another process" in capsys.readouterr().err
    assert (tmp_path / "episodes/lift-0/meta.json").read_text() == "{}"


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ("--policy", "move left", "--task", "lift", "--max-steps", 3, "--workers", 1)
    run_sim(capsys, tmp_path, *arguments, "--episodes", 2)
    kept = (tmp_path / "episodes/lift-0/steps.jsonl").read_bytes()
    torn = tmp_path / "episodes/lift-1/meta.json"
    torn.write_text(json.dumps({"task": "lift"}))  # as a killed run leaves it: begun, without outcome
    summary = run_sim(capsys, tmp_path, *arguments, "--episodes", 3)
    assert summary["episodes"] == 3
    assert (tmp_path / "episodes/lift-0/steps.jsonl").read_bytes() == kept
    assert "outcome" in json.loads(torn.read_text())


ONE_STEP = ("--task", "lift", "--max-steps", 1, "--episodes", 1, "--workers", 1)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Policy -> folder of a run of it, the same each time."""

    @cache
    def begin(policy: str):
        out = tmp_path_factory.mktemp("begun")
        assert main(["sim", "--out", str(out), "--policy", policy, *map(str, ONE_STEP)]) == 0
        return out

    return begin


@pytest.mark.parametrize(
    ("policy", "change", "said"),
    [
        ("move left", ("--seed", 9), "seed was 0 and is 9"),
        ("move left", ("--level", "easy"), 'level was "normal" and is "easy"'),
        ("move left", ("--policy", "stop"), 'policy was "move left" and is "stop"'),
        ("move left", ("--decide", "map"), 'decide was "greedy" and is "map"'),
        ("move left", ("--posterior", "off"), 'posterior was "fast" and is "off"'),
        ("oracle", ("--steps-per-phrase", 2), "steps_per_phrase was null and is 2"),
        slow("tiny", ("--dtype", "bfloat16"), 'dtype was "float32" and is "bfloat16"'),
        slow("tiny", ("--quantize", "8bit"), 'quantize was "none" and is "8bit"'),
    ],
)
def test_a_run_with_other_settings_is_refused_by_their_names(policy, change, said, begun, capsys):
    out = begun(policy)
    before = (out / "meta.json").read_bytes()
    arguments = ["--policy", policy, *ONE_STEP, *change, "--episodes", 2]
    assert main(["sim", "--out", str(out), *map(str, arguments)]) == 2
    assert f"holds a result with other settings: {said}" in capsys.readouterr().err
    assert (out / "meta.json").read_bytes() == before


def test_a_phrase_held_here_is_a_setting_of_the_run_also_with_a_server(tmp_path, capsys):
    with ForeignServer() as server:
        run_sim(capsys, tmp_path, "--policy", server.url, *ONE_STEP, "--steps-per-phrase", 3)
        assert json.loads((tmp_path / "meta.json").read_text())["steps_per_phrase"] == 3
        assert main(["sim", "--policy", server.url, "--out", str(tmp_path), *map(str, ONE_STEP)]) == 2
    assert "steps_per_phrase was 3 and is null" in capsys.readouterr().err


def test_a_run_that_goes_on_elsewhere_says_what_each_part_was_made_with(tmp_path, capsys):
    arguments = ("--policy", "stop", *ONE_STEP)
    run_sim(capsys, tmp_path, *arguments)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert "continued_with" not in meta
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"git": "an older commit"}))
    for _ in range(2):  # the second time nothing is new
        run_sim(capsys, tmp_path, *arguments, "--episodes", 2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["git"] == "an older commit" and report["simulator"]["episodes"] == 2
    assert [part["git"] for part in report["continued_with"]] == [meta["git"]]
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("text", ["", "[]", '{"model": "a server\'s own recording"}'])
def test_a_folder_with_something_else_in_meta_json_is_refused(text, tmp_path, capsys):
    (tmp_path / "meta.json").write_text(text)
    assert main(["sim", "--policy", "stop", "--out", str(tmp_path), *map(str, ONE_STEP)]) == 2
    assert "is of no result of `sim`" in capsys.readouterr().err


def test_over_http_and_in_process_are_the_same(tmp_path, capsys):
    arguments = ("--task", "push", "--episodes", 2, "--max-steps", 6, "--seed", 11)
    run_sim(capsys, tmp_path / "here", "--policy", "random", *arguments, "--workers", 1)
    with serving.serve(build_uniform_engine(), decide="sample") as served:
        run_sim(capsys, tmp_path / "there", "--policy", served.url, *arguments, "--workers", 2)
    for number in range(2):
        here, there = (read_lines(tmp_path / name, f"push-{number}") for name in ("here", "there"))
        assert [line["phrase"] for line in here] == [line["phrase"] for line in there]
        assert [line["proprio"] for line in here] == [line["proprio"] for line in there]
    assert len({line["phrase"] for line in here}) > 3


@contextmanager
def serve_policy(options: PolicyOptions):
    """Our own server of this policy."""
    policies = open_policies(options)
    server = HTTPServer(create_app(policies, ServerSettings()), bind("127.0.0.1", 0))
    try:
        yield server.url
    finally:
        policies.close()
        server.stop()


@pytest.mark.parametrize("policy", ["oracle", slow("move left"), "server"])
def test_random_phrases_are_carried_out_with_the_step_table_of_the_policy(policy, tmp_path, capsys):
    table = StepTable(x_m=0.02, y_m=0.021, z_m=0.022, tilt_rad=0.03, yaw_rad=0.031, tilt_axis="roll")
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps(asdict(table)))
    arguments = ("--task", "reach", "--episodes", 1, "--max-steps", 12, "--workers", 1, "--noise", 0.5)
    if policy == "server":
        with serve_policy(PolicyOptions(model="move left", steps=str(steps))) as url:
            run_sim(capsys, tmp_path / "run", "--policy", url, *arguments)
    else:
        run_sim(capsys, tmp_path / "run", "--policy", policy, "--steps", steps, *arguments)
    lines = read_lines(tmp_path / "run", "reach-0")
    assert len({line["phrase"] for line in lines}) > 3
    for line in lines:
        assert line["action"][:6] == build_action(parse_phrase(line["phrase"]), 0.0, table).tolist()[:6]


def test_nonsense_in_mid_episode_is_a_fault_and_the_run_goes_on(tmp_path, capsys):
    good = json.dumps([0, 0, 0, 0, 0, 0, 1]).encode()
    with ForeignServer(good, good, b"<html>oops</html>", good, good, good) as server:
        arguments = ("--task", "reach", "--episodes", 2, "--max-steps", 3, "--workers", 4)
        summary = run_sim(capsys, tmp_path, "--policy", server.url, *arguments)
    assert (summary["episodes"], summary["faulted"]) == (2, 1)
    first, second = (json.loads((tmp_path / f"episodes/reach-{n}/meta.json").read_text()) for n in range(2))
    assert first["outcome"] == "faulted" and "7 finite numbers" in first["fault"] and first["steps"] == 2
    assert second["outcome"] == "late"
    assert server.asked[0]["proprio"]["shape"] == [8]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tasks"]["reach"]["success"]["n"] == 1


def test_a_server_that_stands_still_faults(tmp_path, capsys):
    with serving.serve() as served:
        served.engine.fault = RuntimeError("out of memory")
        arguments = ("--task", "reach", "--episodes", 1, "--max-steps", 2, "--workers", 1)
        assert main(["sim", "--out", str(tmp_path), "--films", "0", "--policy", served.url, *map(str, arguments)]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["faulted"] == 1
    assert "reach-0 faulted: " in told.err and "out of memory" in told.err


def test_a_server_that_is_not_there(tmp_path, capsys):
    assert main(["sim", "--policy", "http://127.0.0.1:9", "--out", str(tmp_path / "run")]) == 2
    assert "is the server running?" in capsys.readouterr().err


def test_controls(tmp_path, capsys):
    with ForeignServer() as server:
        base = ("--policy", server.url, "--task", "open_drawer", "--episodes", 1, "--max-steps", 1)
        run_sim(capsys, tmp_path / "blank", *base, "--control", "blank-image")
        run_sim(capsys, tmp_path / "wrong", *base, "--control", "wrong-instruction")
    blank, wrong = server.asked
    assert not np.frombuffer(__import__("base64").b64decode(blank["image"]["__numpy__"]), np.uint8).any()
    assert wrong["instruction"] == "close the drawer" and "open" in blank["instruction"]


def test_a_flag_that_would_be_ignored_is_refused(tmp_path, capsys):
    with ForeignServer() as server:
        for policy in (server.url, "oracle"):
            assert main(["sim", "--policy", policy, "--decide", "sample", "--out", str(tmp_path / "run")]) == 2
            assert "takes no --decide" in capsys.readouterr().err


def test_faulted_episodes_are_played_again(tmp_path, capsys):
    good = json.dumps([0, 0, 0, 0, 0, 0, 1]).encode()
    with ForeignServer(good, b"nonsense", good, good) as server:
        arguments = ("--policy", server.url, "--task", "reach", "--episodes", 1, "--max-steps", 2)
        assert run_sim(capsys, tmp_path, *arguments)["faulted"] == 1
        assert run_sim(capsys, tmp_path, *arguments)["faulted"] == 0


def test_a_held_phrase_is_asked_for_less_often(tmp_path, capsys):
    with ForeignServer() as server:
        arguments = ("--policy", server.url, "--task", "reach", "--episodes", 1, "--max-steps", 6)
        run_sim(capsys, tmp_path, *arguments, "--steps-per-phrase", 3)
    assert len(server.asked) == 2


def test_out_must_be_a_run_or_nothing_yet(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        assert main(["sim", "--policy", "oracle", "--out", str(out)]) == 2
        assert "holds something else than a result of `sim`" in capsys.readouterr().err
