"""Websocket clients in the bytes they send: OpenPI's, vla-eval's, RoboArena's, and those of nobody."""

import random

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.server.door import (
    STATE,
    open_door,
    openpi_array,
    openpi_observation,
    read_openpi,
    vla_eval,
    vla_eval_observation,
)
from tests.serving import ACTION, IMAGE, PHRASE
from vlm_local.errors import EngineError, RequestError
from vlm_local.fields import take_any
from vlm_local.server.frames import find_spelling, read_array, read_picture, unpack
from vlm_local.server.service import ServerSettings


def test_openpi_gets_metadata_first_and_a_chunk_in_its_own_spelling():
    with open_door(horizon=5) as (served, url), connect(url, compression=None) as client:
        metadata = msgpack.unpackb(client.recv())
        assert metadata["horizon"] == 5 and metadata["model"] == "steered"
        client.send(openpi_observation())
        answer = msgpack.unpackb(client.recv())
        actions = read_openpi(answer["actions"])
        assert actions.shape == (5, 7) and actions.dtype == np.float64
        np.testing.assert_array_equal(actions, [ACTION] * 5)
        assert answer["phrases"] == [PHRASE] * 5 and 0 < answer["server_timing"]["infer_ms"] < 60_000
        record = served.newest_record()
        assert (record.robot, record.episode, record.step) == ("ws0", 0, 4)
        np.testing.assert_array_equal(record.observation.image, IMAGE)
        np.testing.assert_array_equal(record.observation.proprio, STATE)
        assert record.decision.extra["held"] == 4 and len(served.engine.requests) == 1


def test_the_wrists_picture_is_not_taken_for_the_scenes(door):
    """Wherever it stands, and whatever the scene's camera is called."""
    served, url = door
    wrist, scene = openpi_array(np.zeros((64, 64, 3), np.uint8)), openpi_array(IMAGE)
    with connect(url) as client:
        client.recv()
        for cameras in (
            {"images": {"wrist_image": wrist, "left": scene}},
            {"observation/wrist_image": wrist, "camera_7": scene},
            {"images": {"left_wrist": wrist}, "camera_7": scene},
            {"images": {"left": wrist, "agentview": scene}},  # a name that is known counts first
            {"images": {"agentview": wrist}, "observation/image": scene},
        ):
            client.send(msgpack.packb({"prompt": "go", **cameras}))
            client.recv()
            np.testing.assert_array_equal(served.newest_record().observation.image, IMAGE)
        client.send(msgpack.packb({"prompt": "go", "images": {"wrist": wrist}}))
        assert "no picture came" in client.recv()


def test_other_states_and_no_state_are_no_pose(door):
    served, url = door
    two_fingers = np.array([0.3, 0.0, 0.15, 3.1, 0.1, 0.0, 0.04, -0.04])
    with connect(url) as client:
        client.recv()
        for state in (openpi_array(two_fingers), openpi_array(np.zeros(9)), None):
            client.send(openpi_observation(**{"observation/state": state}))
            client.recv()
            assert served.newest_record().observation.proprio is None
        padded = np.array([0.3, 0.0, 0.15, 0.0, 0.1, 0.0, 0.0, 0.39])  # as AutoEval's stations send it
        client.send(openpi_observation(**{"observation/state": openpi_array(padded)}))
        client.recv()
        np.testing.assert_array_equal(served.newest_record().observation.proprio, STATE)


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (b"\xc1", "no msgpack"),
        (msgpack.packb([1, 2]), "must hold a map"),
        ("{}", "a text frame"),
        (msgpack.packb({"prompt": "go"}), "no picture came"),
        (openpi_observation(**{"observation/image": openpi_array(IMAGE) | {b"dtype": "|O"}}), "is not allowed"),
        (openpi_observation(**{"observation/image": openpi_array(IMAGE) | {b"shape": [9, 9, 3]}}), "takes 243 bytes"),
        (openpi_observation(**{"observation/image": openpi_array(IMAGE) | {b"shape": [-1, 9, 3]}}), "is no shape"),
        (openpi_observation(**{"observation/image": openpi_array(IMAGE.astype("<f4"))}), "expected dtype uint8"),
        (openpi_observation(prompt=7), "expected a string"),
        (openpi_observation(prompt=b"lift it"), "expected a string, got \"b'lift it'\""),
        (openpi_observation(prompt=msgpack.Timestamp(1)), "expected a string"),
        (openpi_observation(**{"observation/state": [None] * 7}), "a NumPy array or a list of numbers"),
        (openpi_observation(**{"observation/state": openpi_array(STATE * 1000)}), "x, y, z in metres, up to 10"),
        (openpi_observation(**{"observation/image": {"__image__": True, "format": "webp"}}), "png, jpeg or raw, got"),
        (msgpack.packb({"image": msgpack.ExtType(4, b"x")}), "extension 4"),
    ],
)
def test_openpi_hears_an_error_as_text_and_the_end(door, frame, says):
    with connect(door[1]) as client:
        client.recv()
        client.send(frame)
        assert says in client.recv()
        with pytest.raises(ConnectionClosed) as closed:
            client.recv()
        assert closed.value.rcvd.code == 1011


def test_roboarena_reads_nothing_but_its_own_fields(door):
    served, url = door
    with connect(f"{url}/roboarena") as client:
        assert set(msgpack.unpackb(client.recv())) == {
            *("image_resolution", "needs_wrist_camera", "n_external_cameras", "needs_stereo_camera"),
            *("needs_session_id", "action_space"),
        }
        observation = {"observation/exterior_image_0_left": openpi_array(IMAGE), "prompt": "go", "endpoint": "infer"}
        places = []
        for _ in range(2):
            client.send(msgpack.packb({"endpoint": "reset"}))
            assert client.recv() == "reset successful"
            for _ in range(2):
                client.send(msgpack.packb(observation))
                assert read_openpi(msgpack.unpackb(client.recv())["actions"]).shape == (1, 7)
                record = served.newest_record()
                places.append((record.episode, record.step))
        first = places[0][0]
        assert places == [(first, 0), (first, 1), (first + 1, 0), (first + 1, 1)]


def test_msgpack_numpys_clients_are_answered_in_its_spelling(door):
    with connect(door[1]) as client:
        client.recv()
        image = {b"nd": True, b"type": "|u1", b"kind": b"", b"shape": IMAGE.shape, b"data": IMAGE.tobytes()}
        client.send(openpi_observation(**{"observation/image": image}))
        actions = msgpack.unpackb(client.recv())["actions"]
        assert actions[b"nd"] is True and actions[b"type"] == "<f8" and actions[b"shape"] == [1, 7]


def test_vla_eval_speaks_first_and_hears_actions_under_the_same_number(door):
    served, url = door
    with connect(f"{url}/vla-eval") as client:
        client.send(vla_eval("hello", {"harness_version": "0.8.0", "protocol_version": 1}, 3))
        hello = msgpack.unpackb(client.recv())
        assert hello["type"] == "hello" and hello["seq"] == 3 and hello["payload"]["protocol_version"] == 1
        for _ in range(2):
            client.send(vla_eval("episode_start", {"task": {"name": "lift"}}))
            for seq in (7, 8):
                client.send(vla_eval_observation(seq))
                answer = msgpack.unpackb(client.recv())
                assert (answer["type"], answer["seq"]) == ("action", seq)
                action = answer["payload"]["actions"]
                assert action["dtype"] == "<f4" and action["shape"] == [7]
                np.testing.assert_array_equal(np.frombuffer(action["data"], "<f4"), np.float32(ACTION))
            record = served.newest_record()
            assert record.step == 1 and record.started_by == "reset"
            np.testing.assert_array_equal(record.observation.image, IMAGE)
            client.send(vla_eval("episode_end", {"metrics": {}}))
        client.send(vla_eval_observation(9, episode_restart=True))
        client.recv()
        assert served.newest_record().step == 0


@pytest.mark.parametrize(
    ("embodiment", "variant", "kind"), [("auto", "", "error"), ("auto", "_pro", "error"), ("libero", "", "hello")]
)
def test_vla_evals_libero_is_refused_where_metres_are_served(embodiment, variant, kind):
    benchmark = f"vla_eval.benchmarks.libero{variant}.benchmark:LIBEROBenchmark"
    with open_door(settings=ServerSettings(embodiment=embodiment)) as (_, url), connect(f"{url}/vla-eval") as client:
        client.send(vla_eval("hello", {"harness_version": "0.8.0", "benchmark": benchmark}))
        answer = msgpack.unpackb(client.recv())
    assert answer["type"] == kind
    assert kind == "hello" or "--embodiment libero" in answer["payload"]["error"]


def test_the_poses_of_vla_evals_simplerenv_are_a_state_from_the_arms_base(door):
    served, url = door
    # As SimplerEnv begins widowx_carrot_on_plate: the base stands turned by half a turn, the hand points down.
    base = [0.147, 0.028, 0.87, 0, 0, 0, 1]
    tips = [-0.1450693, 0.0340915, 1.0053209, 0.0081, -0.7269, 0.0053, 0.6867]
    expected = [0.2920693, -0.0060915, 0.1353209, -0.0045, 0.0568, -0.019, 0.75]

    def tell(client, **changes):
        told = {"base_pose": base, "tcp_pose": tips, "states": [*tips, 0.75], **changes}
        client.send(vla_eval_observation(0, **{name: value for name, value in told.items() if value is not None}))
        return msgpack.unpackb(client.recv())

    with connect(f"{url}/vla-eval") as client:
        client.send(vla_eval("episode_start", {}))
        tell(client)
        np.testing.assert_allclose(served.newest_record().observation.proprio, expected, atol=1e-4)
        for changes in ({"base_pose": None}, {"tcp_pose": tips[:6]}, {"states": [*tips, 0.75, 0.0]}):
            assert tell(client, **changes)["type"] == "action"
            assert served.newest_record().observation.proprio is None
        for wrong in ([0.0] * 7, [*tips[:6], float("nan")]):
            answer = tell(client, tcp_pose=wrong)
            assert answer["type"] == "error" and "all finite" in answer["payload"]["error"]
        assert tell(client)["type"] == "action"


def test_vla_eval_hears_an_error_and_goes_on():
    with open_door(settings=ServerSettings(on_fault="error")) as (served, url), connect(f"{url}/vla-eval") as client:
        served.engine.fault = EngineError("out of memory")
        for frame, says in (
            (vla_eval_observation(4), "out of memory"),
            (vla_eval("observation", {"images": {}}, 4), "no picture came"),
            (vla_eval("dance", {}, 4), "no message of type 'dance'"),
            (msgpack.packb({"type": "observation", "seq": 4}), "a message is a map"),
        ):
            client.send(frame)
            answer = msgpack.unpackb(client.recv())
            assert (answer["type"], answer["seq"]) == ("error", 4) and says in answer["payload"]["error"]
        served.engine.fault = None
        client.send(vla_eval_observation(5))
        assert msgpack.unpackb(client.recv())["type"] == "action"


def mutate(frame: bytes, chance: random.Random) -> bytes:
    changed = bytearray(frame)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(min(len(changed), 400) or 1)
        match chance.randrange(3):
            case 0:
                changed[at : at + 1] = [chance.randrange(256)]
            case 1:
                del changed[at : at + chance.randint(1, 40)]
            case 2:
                changed[at:at] = chance.randbytes(chance.randint(1, 20))
    return bytes(changed)


def test_ten_thousand_frames_of_noise_are_read_or_refused_with_a_reason():
    chance = random.Random(0)
    small = IMAGE[:32, :32]
    good = [
        msgpack.packb({"image": openpi_array(small), "state": openpi_array(STATE), "prompt": "go"}),
        vla_eval("observation", {"images": {"a": {"__image__": True, "format": "raw", "data": b"x", "shape": [1]}}}),
        msgpack.packb({"image": {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2], b"data": bytes(8)}}),
    ]
    for _ in range(10_000):
        frame = (
            chance.randbytes(chance.randrange(300)) if chance.random() < 0.3 else mutate(chance.choice(good), chance)
        )
        try:
            fields = unpack(frame)
            for name, value in fields.items():
                if find_spelling(value):
                    read_array(value, str(name))
                    read_picture(value, take_any)
        except RequestError as error:
            assert len(str(error)) > 10


def test_noise_at_the_socket_leaves_the_door_open(door):
    chance = random.Random(1)
    frames = [openpi_observation(), vla_eval_observation(1)]
    for number in range(60):
        path = ("/", "/vla-eval", "/roboarena")[number % 3]
        with connect(door[1] + path) as client:
            if path != "/vla-eval":
                client.recv()
            client.send(mutate(chance.choice(frames), chance))
            client.recv(timeout=30)
    with connect(door[1]) as client:
        client.recv()
        client.send(openpi_observation())
        assert msgpack.unpackb(client.recv())["phrases"] == [PHRASE]
