"""What an AutoEval station is told, over HTTP in its own bytes, and what is recorded of it."""

import base64
import json
import math

import numpy as np
import pytest

from tests.embodiments.station import RESET_MEASURED, Wrist, e2m, from_bridge, m2e, to_bridge
from tests.embodiments.test_frame import AWAY_M, VECTORS
from tests.server.observing import observe
from tests.serving import PROPRIO, build_body, serve, until
from vlm_local.cli import main
from vlm_local.embodiments import find_file
from vlm_local.server.service import ServerSettings

STATION = ServerSettings(embodiment="autoeval-widowx")
PHRASES = {
    (0, 0.125, 0): "tilt up",
    (0, -0.125, 0): "tilt down",
    (0, 0, 0.125): "rotate counterclockwise",
    (0, 0, -0.125): "rotate clockwise",
    (0, 0.125, -0.125): "tilt up, rotate clockwise",
}


def _ask(server, state) -> np.ndarray:
    """As AutoEval's client: json_numpy both ways."""
    status, _, body = server.post("/act", build_body(proprio=state))
    assert status == 200, body
    told = json.loads(body)
    return np.frombuffer(base64.b64decode(told["__numpy__"]), told["dtype"])


def test_the_metadata_say_in_what_units_an_embodiment_is_told_its_steps():
    for embodiment, units, control_hz, action in (
        ("auto", ["m"] * 3 + ["rad"] * 3 + ["1 open, 0 closed"], 5, [0.0125, 0, 0, 0, 0, 0, 1]),
        ("libero", ["0.0125 m"] * 3 + ["0.5 rad"] * 3 + ["-1 open, 1 closed"], 20, [1, 0, 0, 0, 0, 0, -1]),
    ):
        with serve(settings=ServerSettings(embodiment=embodiment)) as server:
            told = json.loads(server.get("/metadata")[2])["action"]
            assert (told["units"], told["control_hz"]) == (units, control_hz)
            server.engine.phrase = "move forward, open gripper"
            assert server.act(proprio=None)["action"] == action


@pytest.mark.parametrize(("commanded", "meant", "sent", "after"), VECTORS)
def test_the_five_vectors(commanded, meant, sent, after):
    with serve(settings=STATION) as server:
        server.engine.phrase = PHRASES[meant]
        action = _ask(server, [*AWAY_M, *commanded, 0, 0.39])
    np.testing.assert_allclose(action[3:6], sent, atol=2e-6)
    np.testing.assert_allclose(to_bridge(commanded + action[3:6]), after, atol=6e-5)


@pytest.mark.parametrize("embodiment", ["auto", "autoeval-widowx"])
@pytest.mark.parametrize("meant", PHRASES)
def test_from_the_reset_pose_every_step_turns_the_gripper_as_the_phrase_says(embodiment, meant):
    wrist = Wrist()
    with serve(settings=ServerSettings(embodiment=embodiment)) as server:
        server.engine.phrase = PHRASES[meant]
        assert server.post("/reset")[0] == 200
        for _ in range(8):
            before = wrist.bridge
            wrist.act(_ask(server, wrist.state))
            np.testing.assert_allclose(wrist.bridge - before, meant, atol=1e-6)


def test_the_details_say_what_was_meant_what_was_sent_and_the_shadow():
    with serve() as server:
        server.engine.phrase = "move up, tilt up"
        server.act(proprio=None)
        server.post("/reset")
        first, second = (server.act(proprio=Wrist(angles).state) for angles in ((0, math.pi / 2, 0), (0, 1.7, 0)))
        assert (first["frame"], first["shadow"]["hypothesis"], second["shadow"]["hypothesis"]) == (
            "autoeval",
            "reset",
            "executed",
        )
        np.testing.assert_allclose(first["meant"], [0, 0, 0.0125, 0, 0.125, 0, 1])
        np.testing.assert_allclose(second["meant"], first["meant"])
        np.testing.assert_allclose(second["action"], [0, 0, 0.0125, 0, -0.125, 0, 1], atol=1e-9)
        np.testing.assert_allclose(first["shadow"]["measured"], RESET_MEASURED, atol=1e-6)
        assert first["shadow"]["off_rad"] == pytest.approx(0.029, abs=1e-3)
        plain = server.act(proprio=PROPRIO, instruction="something else")
        assert (plain["frame"], plain["shadow"], plain["meant"]) == ("bridge", None, plain["action"])


def test_a_lost_pose_turns_nothing_and_says_so():
    with serve(settings=STATION) as server:
        server.engine.phrase = "move up, tilt up"
        server.act(proprio=[*AWAY_M, *from_bridge((0, 0.2, 0)), 0, 0.39])
        answer = server.act(proprio=[*AWAY_M, *from_bridge((1.0, 0.2, 1.0)), 0, 0.39])
        assert answer["action"][:6] == [0, 0, 0.0125, 0, 0, 0] and "begins anew" in answer["shadow"]["note"]


@pytest.mark.parametrize(("roll", "note"), [(0.25, None), (0.1, "the turn is cut to 0.1 rad")])
def test_limits_hold_in_the_bridge_frame_and_for_the_turn(roll, note):
    limits = (0.05, 0.05, 0.3, roll, 0.1, 0.1)
    with serve(settings=ServerSettings(embodiment="autoeval-widowx", max_step=limits)) as server:
        server.engine.phrase = "tilt up, rotate clockwise"
        answer = server.act(proprio=[*AWAY_M, 1.2, 1.4, 1.3, 0, 0.39])
    np.testing.assert_allclose(answer["meant"][3:6], [0, 0.1, -0.1])
    assert answer["action"][3] > roll  # what is sent may be larger than what is meant
    assert answer["shadow"]["note"] == note


def test_a_step_is_no_longer_than_the_servers_limit():
    """Without a frame that turns it."""
    with serve(settings=ServerSettings(max_step=(0.005, 0.005, 0.005, 0.1, 0.1, 0.1))) as server:
        server.engine.phrase = "move forward"
        assert server.act()["action"] == [0.005, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("embodiment", ["auto", "autoeval-widowx", "simpler-widowx"])
def test_the_submission_test_passes(embodiment):
    with serve(settings=ServerSettings(embodiment=embodiment)) as server:
        action = _ask(server, np.zeros(8, np.float32))
        assert action.shape == (7,) and np.isfinite(action).all()


def test_a_held_station_is_told_to_stand_still():
    with serve(settings=STATION) as server:
        server.engine.phrase = "tilt up"
        wrist = Wrist()
        wrist.act(_ask(server, wrist.state))
        server.post("/hold")
        assert not _ask(server, wrist.state)[:6].any()
        server.post("/release")
        wrist.act(_ask(server, wrist.state))
        np.testing.assert_allclose(wrist.bridge, (0, 0.25, 0), atol=1e-6)


def test_switched_off_the_numbers_pass_as_they_are():
    with serve(settings=ServerSettings(embodiment="bridge-widowx")) as server:
        server.engine.phrase = "tilt up"
        answer = server.act(proprio=Wrist().state)
    assert (answer["frame"], answer["action"]) == ("bridge", answer["meant"])


def test_a_robot_of_the_users_own_has_its_gripper_commanded_with_its_sign(tmp_path):
    path = tmp_path / "mine.json"
    content = json.loads(find_file("bridge-widowx").read_text())
    told = {"gripper_command": {"closed": 1, "open": -1}, "action_units": {"m": 0.05, "rad": 0.5}}
    path.write_text(json.dumps(content | told))
    with serve(settings=ServerSettings(embodiment=str(path))) as server:
        server.engine.phrase = "move forward, tilt down, close gripper"
        answer = server.act()
        np.testing.assert_allclose(answer["meant"], [0.0125, 0, 0, 0, -0.125, 0, 0], atol=1e-9)
        np.testing.assert_allclose(answer["action"], [0.25, 0, 0, 0, -0.25, 0, 1], atol=1e-9)
        server.engine.phrase = "stop"
        assert server.act()["action"][6] == 1  # the latch remembers what was meant
        server.engine.phrase = "open gripper"
        assert server.act()["action"][6] == -1


def _drive_forward(server, seed: int, episode: int) -> None:
    """30 steps, 0.0125 m each, with noise of 0.04 rad on each measured angle, as the shared description asks."""
    server.post("/reset")
    random, wrist = np.random.default_rng(seed), Wrist()
    for _ in range(31):
        state = wrist.state.astype(float)
        state[3:6] = m2e(e2m(state[3:6] + random.normal(0, 0.04, 3)))  # a pitch beyond pi/2 is never read
        answer = server.act(proprio=state)
        assert answer["episode"] == episode
        wrist.act(answer["action"])


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, pytest.param(10, marks=pytest.mark.long)])
def test_labels_of_a_stations_recording_are_right_with_the_frame_and_not_without(seeds, tmp_path, capsys):
    right = {}
    for name in ("auto", "bridge-widowx"):
        with observe(tmp_path / name, ServerSettings(embodiment=name)) as server:
            server.engine.phrase = "move forward"
            for seed in range(seeds):
                _drive_forward(server, seed, seed)
            until(lambda server=server: server.observed.report_recording()["written"] == 31 * seeds)
        assert main(["label", str(tmp_path / name), "--out", str(tmp_path / f"{name}.jsonl")]) == 0
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        full = [row["phrase"] == "move forward" for row in rows if row["step"] < 30]
        right[name] = sum(full) / seeds
    with capsys.disabled():
        print(f"\nright labels of 30, mean of {seeds} seeds: {right}")
    assert right["auto"] >= 25
    assert right["bridge-widowx"] < 20
