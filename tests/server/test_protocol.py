"""Each client of the protocol, in the bytes it sends, over a real socket."""

import base64
import json
import re
import socket
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import serving
from tests.serving import ACTION, IMAGE, PROPRIO, ask, build_body, exchange, serve
from vlm_local.bounds import MAX_LISTED
from vlm_local.fields import MAX_ANGLE_RAD, MAX_POSITION_M, MAX_SIDE, MIN_SIDE
from vlm_local.server.access import MAX_SMALL_BODY
from vlm_local.wire import MAX_BODY, MAX_INSTRUCTION, encode_array


@pytest.fixture(scope="module")
def server():
    with serve() as served:
        yield served


def _send(server, path: str, body: bytes, *headers: str) -> tuple[int, bytes]:
    """A raw HTTP/1.1 request -> status and body."""
    lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", *headers, f"Content-Length: {len(body)}"]
    answer = exchange(server.port, "\r\n".join([*lines, "", ""]).encode() + body)
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), rest


_REQUESTS = (
    "User-Agent: python-requests/2.32.3",
    "Accept-Encoding: gzip, deflate",
    "Accept: */*",
    "Connection: keep-alive",
)
_JSON = "Content-Type: application/json"


def _read_array(text: bytes | str) -> np.ndarray:
    value = json.loads(text)
    return np.frombuffer(base64.b64decode(value["__numpy__"]), value["dtype"]).reshape(value["shape"])


def test_autoeval_rollout(server):
    assert _send(server, "/reset", b"", *_REQUESTS)[0] == 200
    status, body = _send(server, "/act", build_body(), *_REQUESTS, _JSON)
    action = _read_array(body)
    assert status == 200 and action.dtype == np.float64
    np.testing.assert_array_equal(action, ACTION)
    observation = server.engine.requests[-1]
    np.testing.assert_array_equal(observation.image, IMAGE)
    assert server.newest_record().observation.proprio[6] == pytest.approx(1.0)  # 0.39 is open


def test_autoeval_keeps_one_connection_for_a_whole_trajectory(server):
    body = build_body()
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        reader = connection.makefile("rb")
        for _ in range(5):
            head = f"POST /act HTTP/1.1\r\nHost: x\r\n{_JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
            lines = iter(reader.readline, b"\r\n")
            length = next(
                int(line.split(b":")[1]) for line in list(lines) if line.lower().startswith(b"content-length")
            )
            np.testing.assert_array_equal(_read_array(reader.read(length)), ACTION)


def test_autoeval_submission_test(server):
    server.post("/reset")
    black = np.zeros((256, 256, 3), np.uint8)
    status, body = _send(server, "/act", build_body(black, "test connection", [0.0] * 8), *_REQUESTS, _JSON)
    assert status == 200 and _read_array(body).shape == (7,)


def test_autoeval_reset_policy_with_null_keeps_the_instruction(server):
    server.act(instruction="close the drawer")
    server.act(instruction=None)
    assert server.newest_record().observation.instruction == "close the drawer"
    server.post("/reset")
    status, _, body = server.post("/act", build_body(instruction=None))
    assert status == 400 and "this episode has none yet" in json.loads(body)["error"]


@pytest.mark.parametrize("proprio", [None, [0.3, 0, 0.1, 0, 0, 0, 0.5]])
def test_simplerenv_and_openvla_clients(server, proprio):
    body = build_body(proprio=proprio, unnorm_key="bridge_orig")
    status, answer = _send(server, "/act", body, *_REQUESTS, _JSON)
    assert status == 200 and _read_array(answer).shape == (7,)
    seen = server.newest_record().observation.proprio
    assert (seen is None) if proprio is None else (seen[6] == 0.5)


def test_double_encoded(server):
    inner = build_body(instruction="open the drawer").decode()
    status, body = _send(server, "/act", json.dumps({"encoded": inner}).encode(), *_REQUESTS, _JSON)
    text = json.loads(body)
    assert status == 200 and isinstance(text, str)
    np.testing.assert_array_equal(_read_array(text), ACTION)


def test_inspect_robots_widowx_sends_no_content_type(server):
    body = build_body(proprio=None, unnorm_key="bridge_orig")
    status, answer = _send(server, "/act", body)
    action = _read_array(answer)
    assert status == 200 and action.shape == (7,)
    assert abs(action[:3]).max() <= 0.05 and abs(action[3:6]).max() <= 0.25


def _png() -> str:
    buffer = BytesIO()
    Image.fromarray(IMAGE).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "image", [IMAGE.tolist(), _png(), f"data:image/png;base64,{_png()}"], ids=["list", "png", "url"]
)
def test_plain_clients_get_a_plain_list(server, image):
    body = json.dumps({"image": image, "instruction": "lift the cup", "proprio": PROPRIO}).encode()
    status, answer = _send(server, "/act", body, "Content-Type: text/plain")
    assert status == 200 and json.loads(answer) == ACTION
    np.testing.assert_array_equal(server.engine.requests[-1].image, IMAGE)


@pytest.mark.slow
def test_the_largest_image_in_the_largest_form(server):
    image = np.zeros((4096, 4096, 3), np.uint8)
    status, _, body = server.post("/act", build_body(image))
    assert status == 200, body


def test_details_are_an_object_whatever_the_form(server):
    server.post("/act", build_body())  # a reset is of the unnamed robot that called last
    server.post("/reset", b'{"seed": 5}')
    for body in (build_body(), json.dumps({"encoded": build_body().decode()}).encode()):
        status, _, answer = server.post("/act?details=1", body)
        details = json.loads(answer)
        assert status == 200 and details["action"] == ACTION and details["phrase"] == serving.PHRASE
    assert (details["episode"] >= 0, details["step"], details["seed"], details["robot"][:5]) == (True, 1, 5, "robot")
    assert details["fault"] is None and details["model"] == "steered"
    assert set(details["axes"]) == set(details["marginals"]) == {"x", "y", "z", "tilt", "yaw", "gripper"}
    timings = details["timings_ms"]
    assert {"decode", "wait", "engine"} <= set(timings) and timings["engine"] < timings["total"] < 60_000


def test_the_document_of_the_interface_names_each_field_and_bound(server):
    text = (Path(__file__).parents[2] / "docs/http.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", text.partition("## Details")[2].partition("\n## ")[0], re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(server.act())
    for bound in (MAX_BODY, MAX_SMALL_BODY, MAX_LISTED, MAX_INSTRUCTION):
        assert f"{bound:,}" in text
    for bound in (f"{MIN_SIDE} to {MAX_SIDE}", f"above {MAX_POSITION_M:g} m", f"above {MAX_ANGLE_RAD:.1f} rad"):
        assert bound in text


@pytest.mark.parametrize("query", ["", "details=0", "details=False", "details=1", "details=true"])
def test_details_are_sent_to_those_who_ask_for_them(server, query):
    answer = json.loads(server.post(f"/act?{query}", build_body())[2])
    assert ("phrase" in answer) == (query in ("details=1", "details=true"))


def test_a_body_in_chunks(server):
    body = build_body()
    parts = [body[i : i + 50_000] for i in range(0, len(body), 50_000)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
    head = f"POST /act HTTP/1.1\r\nHost: x\r\n{_JSON}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    assert exchange(server.port, head + chunks).startswith(b"HTTP/1.1 200")


def test_health_and_metadata(server):
    status, _, body = ask(server.port, "GET", "/health")
    assert (status, json.loads(body)["status"]) == (200, "healthy")
    metadata = json.loads(ask(server.port, "GET", "/metadata")[2])
    assert metadata["server"] == "vlm-local" and metadata["model"] == "steered"
    assert len(metadata["action"]["names"]) == 7 and metadata["action"]["control_hz"] == 5


def test_an_array_answer_is_what_the_librarys_reader_expects(server):
    json_numpy = pytest.importorskip("json_numpy")
    _, _, body = server.post("/act", json_numpy.dumps({"image": IMAGE, "instruction": "go"}).encode())
    np.testing.assert_array_equal(json_numpy.loads(body), ACTION)
    assert encode_array(np.array(ACTION)) == json.loads(body)
