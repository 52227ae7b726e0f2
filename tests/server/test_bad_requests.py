"""Nothing a client sends gets a traceback or brings the server down. What the codec refuses: test_wire.py."""

import gzip
import json
import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving import IMAGE, build_body, exchange, serve, until
from vlm_local.wire import MAX_BODY, encode_array


@pytest.fixture(scope="module")
def server():
    with serve() as served:
        served.act()
        yield served
        assert served.get("/health")[0] == 200
        served.act()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "the body is empty"),
        (b'{"image": ', "not complete JSON"),
        (b"\xff\xfe\x00", "in UTF-16"),
        (build_body(IMAGE / 255.0), "expected dtype uint8"),
        (build_body(IMAGE[None]), "expected shape (H, W, 3)"),
        (build_body(proprio=[float("nan")] * 8), "all finite"),
        (json.dumps({"image": {**encode_array(IMAGE), "__numpy__": "%%%"}, "instruction": "go"}).encode(), "base64"),
    ],
)
def test_a_bad_body_gets_a_sentence(server, body, sentence):
    status, headers, answer = server.post("/act", body)
    assert status == 400 and headers["Content-Type"] == "application/json"
    assert sentence in json.loads(answer)["error"]
    assert b"Traceback" not in answer


def test_a_compressed_body_is_refused_as_such(server):
    status, _, answer = server.post("/act", gzip.compress(build_body()), {"Content-Encoding": "gzip"})
    assert status == 415 and "Content-Encoding 'gzip'" in json.loads(answer)["error"]
    assert server.post("/act", build_body(), {"Content-Encoding": "identity"})[0] == 200


def test_a_websocket_at_the_port_of_http_hears_of_its_own(server):
    for path in ("/", "/vla-eval"):
        status, _, answer = server.get(path, {"Upgrade": "websocket", "Connection": "Upgrade"})
        assert status == 400 and "--websocket-port" in json.loads(answer)["error"]


def test_a_wrong_method_and_a_wrong_path(server):
    status, headers, answer = server.get("/act")
    assert status == 405 and "POST" in headers["Allow"] and "takes POST, not GET" in json.loads(answer)["error"]
    status, _, answer = server.post("/nowhere")
    assert status == 404 and "POST /act" in json.loads(answer)["error"]


@pytest.mark.parametrize("name", ["", "..", ".", "a" * 65, "a b", "ä", "%2e%2e", "a%2fb"])
def test_a_wrong_name_of_a_robot(server, name):
    path = f"/s/{name}/act".replace(" ", "%20").replace("ä", "%C3%A4")
    assert server.post(path, build_body())[0] == 404


def test_a_hundred_megabytes_are_refused_and_the_client_hears_why(server):
    status, _, answer = server.post("/act", b"x" * 100_000_000)
    assert status == 413 and f"larger than the {MAX_BODY} bytes" in json.loads(answer)["error"]


def test_a_hundred_megabytes_in_chunks_are_refused_too(server):
    chunk = b"1000000\r\n" + b"x" * 0x1000000 + b"\r\n"  # 16 MiB
    head = b"POST /act HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = exchange(server.port, head + chunk * 6 + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")


def test_who_asks_before_sending_too_much_is_told_at_once(server):
    head = b"POST /act HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100000000\r\n\r\n"
    answer = exchange(server.port, head)
    assert b" 413 " in answer.splitlines()[0]


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02 garbage\r\n\r\n",
        b"POST /act HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"POST /act HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /act HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nnothex\r\n",
        b"POST /act HTTP/1.1\r\nA: " + b"a" * 300_000 + b"\r\n\r\n",
        b"POST /act HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["garbage", "length", "encoding", "chunk", "headers", "no-body"],
)
def test_what_is_not_http_gets_a_4xx_in_json(server, data):
    head, _, body = exchange(server.port, data).partition(b"\r\n\r\n")
    assert 400 <= int(head.split()[1]) < 500
    assert json.loads(body)["error"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "use http://, not https://"),
        (b"POST /act HTTP/1.1\nHost: x\nContent-Length: 2\n\n{}", "must end with CR LF"),
        (b"POST /act HTTP/1.1\nHost: x\nContent-Length: 20000\n\n{" + b" " * 20_000, "must end with CR LF"),
        (b"\r\n" * 100, "empty lines"),
    ],
    ids=["tls", "line-feeds", "line-feeds-and-a-picture", "empty-lines"],
)
def test_what_would_never_become_a_request_is_told_so_at_once(server, data, sentence):
    head, _, body = exchange(server.port, data).partition(b"\r\n\r\n")
    assert b" 400 " in head.splitlines()[0] and sentence in json.loads(body)["error"]


def test_a_flood_of_requests_ahead_of_their_answers_is_read_no_further(server):
    """A quarter of a megabyte of short ones kept all robots waiting for half a second, and 64 of these for 17 s."""
    before, body, answers = len(server.engine.requests), build_body(), b""
    server.engine.gate.clear()
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(b"POST /act HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: len(server.engine.requests) > before)
        client.sendall(b"\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        server.get("/health")  # the loop has read them
        server.engine.gate.set()
        while part := client.recv(65536):
            answers += part
    assert answers.count(b" 200 OK") == 8 and answers.count(b"HTTP/1.") == 9
    assert b"too many requests came before one was answered" in answers


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["/act", "/reset", "/s/a/act", "/act?details=1", "/health", "/%ff"]))
def test_random_bytes_never_get_a_5xx(server, body, path):
    assert server.post(path, body)[0] < 500


def test_a_client_that_disconnects_in_mid_body_is_forgotten(server):
    before = len(server.engine.requests)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /act HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + b"x" * 1000)
    server.act()
    assert len(server.engine.requests) == before + 1


def test_slow_senders_hold_nobody_up(server):
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b"POST /act HTTP/1.1\r\nContent-Length: 200000\r\n\r\nxx")
        server.act()
        assert server.get("/health")[0] == 200
    finally:
        for connection in slow:
            connection.close()


def test_refusals_are_published(server):
    server.post("/act", b"{", None)
    refusal = server.newest_record()
    assert (refusal.route, refusal.robot, refusal.status) == ("/act", "robot", 400) and "JSON" in refusal.reason


def test_an_image_of_another_kind_than_uint8_names_what_came(server):
    _, _, answer = server.post("/act", build_body(IMAGE.astype(np.int64)))
    assert "int64" in json.loads(answer)["error"]
