"""Websocket clients in the bytes they send: OpenPI's, vla-eval's, RoboArena's, and those of nobody."""

import errno
import io
import random
import socket
from contextlib import ExitStack, contextmanager, suppress

import msgpack
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.serving import ACTION, IMAGE, PHRASE, read_answer, serve, until
from vlm_local.errors import EngineError, RequestError
from vlm_local.fields import take_any
from vlm_local.server.access import Gate, parse_networks
from vlm_local.server.frames import find_spelling, read_array, read_picture, unpack
from vlm_local.server.serve import bind
from vlm_local.server.service import ServerSettings
from vlm_local.server.websocket import MAX_CONNECTIONS, WebsocketDoor

BUDGET = "vlm_local.server.budget.MAX_HELD"
HANDSHAKE = (
    b"GET /vla-eval HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
STATE = np.array([0.3, 0.0, 0.15, 0.0, 0.1, 0.0, 1.0])


@contextmanager
def open_door(horizon=1, **serving):
    with serve(**serving) as served:
        door = WebsocketDoor(served.service, bind("127.0.0.1", 0), horizon)
        try:
            yield served, f"ws://127.0.0.1:{door.port}"
        finally:
            door.close()


@pytest.fixture(scope="module")
def door():
    with open_door() as opened:
        yield opened


def openpi_array(array):
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def openpi_observation(**changes):
    fields = {"observation/image": openpi_array(IMAGE), "observation/state": openpi_array(STATE), "prompt": "lift it"}
    return msgpack.packb({**fields, **changes})


def vla_eval(kind, payload, seq=0):
    return msgpack.packb({"type": kind, "payload": payload, "seq": seq, "timestamp": 1.5})


def vla_eval_observation(seq, **changes):
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    picture = {"__image__": True, "format": "png", "data": file.getvalue(), "shape": IMAGE.shape}
    return vla_eval(
        "observation", {"images": {"wrist": picture, "agentview": picture}, "task_description": "go", **changes}, seq
    )


def read_openpi(answer):
    return np.frombuffer(answer[b"data"], answer[b"dtype"]).reshape(answer[b"shape"])


def test_openpi_gets_metadata_first_and_a_chunk_in_its_own_spelling():
    with open_door(horizon=5) as (served, url), connect(url, compression=None) as client:
        metadata = msgpack.unpackb(client.recv())
        assert metadata["horizon"] == 5 and metadata["model"] == "steered"
        client.send(openpi_observation())
        answer = msgpack.unpackb(client.recv())
        actions = read_openpi(answer["actions"])
        assert actions.shape == (5, 7) and actions.dtype == np.float64
        np.testing.assert_array_equal(actions, [ACTION] * 5)
        assert answer["phrases"] == [PHRASE] * 5 and answer["server_timing"]["infer_ms"] > 0
        record = served.newest_record()
        assert (record.robot, record.episode, record.step) == ("ws0", 0, 4)
        np.testing.assert_array_equal(record.observation.image, IMAGE)
        np.testing.assert_array_equal(record.observation.proprio, STATE)
        assert record.decision.extra["held"] == 4 and len(served.engine.requests) == 1


def test_an_episode_begins_with_a_connection_and_with_another_prompt(door):
    served, url = door
    episodes = []
    for _ in range(2):
        with connect(f"{url}/s/arm") as client:
            client.recv()
            for prompt in ("lift it", "lift it", "drop it"):
                client.send(openpi_observation(prompt=prompt))
                client.recv()
                record = served.newest_record()
                assert record.robot == "arm"
                episodes.append(record.episode)
    assert episodes == [0, 0, 1, 2, 2, 3]


def test_connections_at_once_are_robots_of_their_own(door):
    served, url = door
    robots = []
    with connect(url) as first, connect(url) as second:
        for client in (first, second):
            client.recv()
            client.send(openpi_observation())
            client.recv()
            robots.append(served.newest_record().robot)
    assert sorted(robots) == ["ws0", "ws1"]
    until(lambda: _find_name(*door) == "ws0")  # a script that connects anew is the same robot


def _find_name(served, url):
    with connect(url) as client:
        client.recv()
        client.send(openpi_observation())
        client.recv()
        return served.newest_record().robot


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


def test_no_arm_moves_by_the_instruction_of_the_connection_before(door):
    answers = []
    for instruction in ("lift it", None):
        with connect(f"{door[1]}/s/left/vla-eval") as client:
            client.send(vla_eval_observation(0, task_description=instruction))
            answers.append(msgpack.unpackb(client.recv()))
    assert [answer["type"] for answer in answers] == ["action", "error"]
    assert "no instruction has come over this connection" in answers[1]["payload"]["error"]


def test_who_has_no_token_does_not_come_in():
    with open_door(settings=ServerSettings(gate=Gate("correct-horse"))) as (_, url):
        for path, headers in (("/", {}), ("/t/wrong-horse/", {}), ("/", {"Authorization": "Api-Key wrong-horse"})):
            with pytest.raises(InvalidStatus) as refused:
                connect(url + path, additional_headers=headers)
            assert refused.value.response.status_code == 401
        for path, headers in (
            ("/t/correct-horse/", {}),
            ("/", {"Authorization": "Api-Key correct-horse"}),
            ("/", {"Authorization": "Bearer correct-horse"}),
        ):
            with connect(url + path, additional_headers=headers) as client:
                client.recv()


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"Origin": "https://evil.example"}, 403),
        ("/act", {}, 404),
        ("/s/..%2f/", {}, 404),
        ("/healthz", {}, 200),
        ("/health", {}, 200),
    ],
)
def test_what_is_answered_by_http(door, path, headers, status):
    assert _ask_http(door[1] + path, headers) == status


def _ask_http(url, headers=None):
    with pytest.raises(InvalidStatus) as answered:
        connect(url, additional_headers=headers)
    return answered.value.response.status_code


def test_a_server_that_cannot_answer_says_so_to_probes():
    with open_door() as (served, url):
        served.service.stopping.set()
        assert _ask_http(f"{url}/healthz") == 503


def test_an_address_is_let_in_or_not():
    with open_door(settings=ServerSettings(gate=Gate(None, parse_networks("10.0.0.0/8")))) as (_, url):
        assert _ask_http(url) == 403
    with open_door(settings=ServerSettings(gate=Gate(None, parse_networks("127.0.0.0/8")))) as (_, url), connect(url):
        pass


def test_who_sends_more_than_the_rate_hears_why():
    with open_door(settings=ServerSettings(rate_limit=0.001)) as (_, url), connect(f"{url}/vla-eval") as client:
        answers = []
        for seq in range(3):
            client.send(vla_eval_observation(seq))
            answers.append(msgpack.unpackb(client.recv()))
        assert [answer["type"] for answer in answers] == ["action", "error", "error"]
        assert "slow down" in answers[1]["payload"]["error"]


def test_silent_connections_keep_no_robot_out(door):
    with connect(door[1]) as early, ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 20):
            stack.enter_context(socket.create_connection(("127.0.0.1", _port_of(door[1]))))
        with connect(door[1]) as late:
            for client in (early, late):
                client.recv()
                client.send(openpi_observation())
                assert len(msgpack.unpackb(client.recv())["phrases"]) == 1


def test_half_sent_frames_keep_no_robot_out_that_still_shakes_hands(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 4)
    with open_door() as (_, url), ExitStack() as stack:
        half, robot, later = [[stack.enter_context(socket.socket()) for _ in range(count)] for count in (4, 1, 1)]
        for client in half:
            _send_begin(url, client, 1000)
        for client in robot + later:
            client.connect(("127.0.0.1", _port_of(url)))
            client.sendall(HANDSHAKE[:40])
        until(lambda: sum(map(_has_ended, half)) == 2)
        robot[0].settimeout(60)
        robot[0].sendall(HANDSHAKE[40:])
        assert b"101" in robot[0].recv(64)


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


def test_one_robot_too_many_hears_why():
    with open_door(settings=ServerSettings(max_robots=1)) as (served, url):
        served.act("/s/other/act?details=1")
        with connect(url) as client:
            client.recv()
            assert "serves 1 robots" in client.recv()
            with pytest.raises(ConnectionClosed) as closed:
                client.recv()
        assert closed.value.rcvd.code == 1011


@pytest.mark.parametrize("name", ["Host", "Origin", "Authorization", "Sec-Fetch-Site"])
def test_a_header_that_comes_twice_is_no_failure_of_the_server(door, name):
    lines = [f"{name}: localhost", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    lines += ["Host: localhost", f"{name}: b", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    with socket.create_connection(("127.0.0.1", _port_of(door[1])), 60) as client:
        client.sendall("\r\n".join(["GET / HTTP/1.1", *lines, "", ""]).encode())
        assert client.recv(12) in (b"HTTP/1.1 101", b"HTTP/1.1 403")


def _port_of(url):
    return int(url.rsplit(":", 1)[1])


def _send_begin(url, client, num_bytes):
    """A handshake, and so many bytes of a frame of 8 MB."""
    client.connect(("127.0.0.1", _port_of(url)))
    client.sendall(HANDSHAKE)
    assert b"101" in client.recv(64)
    client.sendall(b"\x82\xff" + (8_000_000).to_bytes(8) + bytes(4) + bytes(num_bytes))


def test_frames_on_their_way_have_a_budget_and_the_largest_go(monkeypatch):
    monkeypatch.setattr(BUDGET, 1_000_000)
    with open_door() as (_, url), ExitStack() as stack:
        robot = stack.enter_context(connect(url))
        robot.recv()
        strangers = [stack.enter_context(socket.socket()) for _ in range(8)]
        for stranger in strangers:
            _send_begin(url, stranger, 400_000)
            robot.send(openpi_observation())
            assert msgpack.unpackb(robot.recv())["phrases"] == [PHRASE]
        until(lambda: sum(not _has_ended(stranger) for stranger in strangers) <= 2)
        assert not _has_ended(strangers[-1]) or not _has_ended(strangers[-2])


def test_frames_and_bodies_on_their_way_share_a_budget(monkeypatch):
    monkeypatch.setattr(BUDGET, 1_000_000)
    with open_door() as (served, url), ExitStack() as stack:
        small, large, frames, more = (stack.enter_context(socket.socket()) for _ in range(4))
        for client, length in ((small, 200_000), (large, 800_000)):
            client.connect(("127.0.0.1", served.port))
            head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
            client.sendall(head + bytes(length - 100_000))
        _send_begin(url, frames, 400_000)
        assert read_answer(large).startswith(b"HTTP/1.1 503")
        assert not _has_ended(frames)
        _send_begin(url, more, 600_000)
        until(lambda: _has_ended(more))
        assert not _has_ended(frames)
        small.sendall(bytes(100_000))
        assert read_answer(small).startswith(b"HTTP/1.1 400")  # zeros: it was read to its end


def test_a_long_connection_comes_to_no_budget(monkeypatch):
    """What was answered is not counted any more."""
    monkeypatch.setattr(BUDGET, 1_000_000)
    with open_door() as (_, url), connect(url) as robot:
        robot.recv()
        for _ in range(12):
            robot.send(openpi_observation())
            assert msgpack.unpackb(robot.recv())["phrases"] == [PHRASE]


def _has_ended(client):
    client.settimeout(0.01)
    try:
        while client.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


@contextmanager
def _deaf_clients(url, count):
    """Clients that send rubbish, each piece of which is answered, and read nothing. Gives them once they are stuck."""
    with ExitStack() as stack:
        deaf = [stack.enter_context(socket.socket()) for _ in range(count)]
        for client in deaf:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", _port_of(url)))
            client.sendall(HANDSHAKE)
            assert b"101" in client.recv(64)
            client.settimeout(0.5)
        for client in deaf:
            with suppress(TimeoutError, ConnectionError):
                for _ in range(1000):
                    client.sendall(b"\x82\x81\0\0\0\0x" * 1000)
        yield deaf


def test_who_reads_no_answer_keeps_no_robot_out_and_no_server_up(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 2)
    with open_door() as (_, url), _deaf_clients(url, 2) as deaf:
        with connect(url) as client:
            client.recv()
            client.send(openpi_observation())
            assert msgpack.unpackb(client.recv())["phrases"] == [PHRASE]
        until(lambda: _is_closed(deaf[0]) or _is_closed(deaf[1]))


def _is_closed(client):
    try:
        client.sendall(b"x")
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


def test_an_answer_that_nobody_waited_for_turns_no_gripper():
    with open_door() as (served, url):
        served.engine.phrase = "close gripper"
        served.engine.gate.clear()
        with connect(f"{url}/s/left", compression=None) as client:
            client.recv()
            client.send(openpi_observation())
            until(lambda: served.engine.requests)
        served.engine.gate.set()
        until(lambda: served.records)
        served.engine.phrase = "move up"
        answer = served.act("/s/left/act?details=1", instruction="lift it", proprio=STATE.tolist())
        assert (answer["step"], answer["action"][6]) == (1, 1)


def test_who_is_not_waited_for_is_not_hung_up_on(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 1)
    with open_door() as (served, url), connect(url) as client:
        client.recv()
        client.send(openpi_observation())
        client.recv()
        served.engine.gate.clear()
        client.send(openpi_observation())
        until(lambda: len(served.engine.requests) == 2)
        with socket.create_connection(("127.0.0.1", _port_of(url)), 60) as second:
            assert read_answer(second) == b""
        served.engine.gate.set()
        assert msgpack.unpackb(client.recv())["phrases"] == [PHRASE]


def test_where_all_have_acted_the_one_that_has_rested_longest_makes_room(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 2)
    with open_door() as (_, url), ExitStack() as stack:
        robots = []
        for _ in range(3):
            robots.append(stack.enter_context(connect(url)))
            robots[-1].recv()
            robots[-1].send(openpi_observation())
            robots[-1].recv()
        robots[1].send(openpi_observation())
        assert msgpack.unpackb(robots[1].recv())["phrases"] == [PHRASE]
        with pytest.raises(ConnectionClosed):
            robots[0].recv(timeout=10)


def test_connections_that_have_ended_take_no_place(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 4)
    with open_door() as (_, url), connect(url) as robot:
        robot.recv()
        for _ in range(12):
            with connect(url) as other:
                other.recv()
        robot.send(openpi_observation())
        assert msgpack.unpackb(robot.recv())["phrases"] == [PHRASE]


def test_many_that_come_at_once_keep_no_more_places_than_there_are(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 4)
    with open_door() as (_, url), ExitStack() as stack:
        crowd = [stack.enter_context(socket.socket()) for _ in range(80)]
        for client in crowd:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", _port_of(url)))
        until(lambda: sum(not _has_ended(client) for client in crowd) <= 4)


class _ShortOfFiles:
    """A listener for whose first connection no file is left."""

    def __init__(self, listener):
        self._listener, self._errors = listener, [OSError(errno.EMFILE, "no file is left")]

    def accept(self):
        if self._errors:
            raise self._errors.pop()
        return self._listener.accept()

    def __getattr__(self, name):
        return getattr(self._listener, name)


def test_no_file_left_for_a_connection_is_not_the_end_of_the_door():
    with serve() as served:
        door = WebsocketDoor(served.service, _ShortOfFiles(bind("127.0.0.1", 0)), 1)
        try:
            with connect(f"ws://127.0.0.1:{door.port}") as client:
                assert msgpack.unpackb(client.recv())
        finally:
            door.close()


def test_the_end_of_the_server_ends_its_connections():
    with serve() as served:
        door = WebsocketDoor(served.service, bind("127.0.0.1", 0), 1)
        with connect(f"ws://127.0.0.1:{door.port}") as client:
            client.recv()
            door.close()
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=10)
