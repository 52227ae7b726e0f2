import json
import logging
import socket

import pytest

from tests.serving import build_body, serve, until
from vlm_local.errors import ConfigError, RequestError
from vlm_local.server.access import Address, Gate, RateLimit, parse_address, parse_networks, read_token
from vlm_local.server.service import ServerSettings

TOKEN = "correct-horse-battery"


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("/act", Address("/act")),
        ("/", Address("/")),
        ("/s/left/act", Address("/act", "left")),
        ("/t/abc/act", Address("/act", token="abc")),
        ("/t/abc/s/left/reset", Address("/reset", "left", "abc")),
        ("/t/abc", Address("/", token="abc")),
        ("/s/left", Address("/", "left")),
        ("/robots/s/left/act", Address("/act", "left")),
        ("/robots", Address("/")),
        ("/robotsact", Address("/robotsact")),
    ],
)
def test_an_address_is_taken_apart(path, address):
    assert parse_address(path, "/robots") == address


def _check(gate, remote, token, authorization):
    gate.check(remote, read_token(token, authorization))


def _refusal(gate, *given):
    with pytest.raises(RequestError) as caught:
        _check(gate, *given)
    return caught.value.status


def test_the_gate():
    assert Gate().is_open
    _check(Gate(), "8.8.8.8", None, "")
    gate = Gate(TOKEN, parse_networks("10.0.0.0/8, 192.168.1.7,::1"))
    for given in [("8.8.8.8", TOKEN, ""), ("8.8.8.8", None, f"Bearer {TOKEN}"), ("8.8.8.8", None, f"bearer  {TOKEN}")]:
        _check(gate, *given)
    for near in ("10.1.2.3", "192.168.1.7", "::ffff:10.1.2.3", "::1"):
        _check(gate, near, None, "")
    assert _refusal(gate, "8.8.8.8", None, "") == 401
    assert _refusal(gate, "8.8.8.8", "wrong-token", "") == 401
    assert _refusal(gate, "8.8.8.8", "ü", "") == 401
    assert _refusal(gate, "8.8.8.8", None, "Basic abc") == 401
    assert _refusal(gate, "8.8.8.8", TOKEN, "Bearer wrong") == 401
    assert _refusal(Gate(None, parse_networks("10.0.0.0/8")), "192.168.1.8", TOKEN, "") == 403


@pytest.mark.parametrize("token", ["", "short", "with/slash/inside", "with space here"])
def test_a_token_must_fit_into_an_address(token):
    with pytest.raises(ConfigError):
        Gate(token)


@pytest.mark.parametrize("text", ["10.0.0.0/33", "example.org", "10.0.0.1/8"])
def test_networks_are_addresses(text):
    with pytest.raises(ConfigError, match="allow-from"):
        parse_networks(text)


def test_over_http_a_token_opens_each_route_and_health_needs_none(caplog):
    caplog.set_level("DEBUG")
    with serve(settings=ServerSettings(gate=Gate(TOKEN))) as server:
        server.service.report["tunnel"] = lambda: "up"
        assert json.loads(server.get("/health")[2]) == {"status": "healthy"}
        assert json.loads(server.get(f"/t/{TOKEN}/health")[2]) == {
            "status": "healthy",
            "held": {"all": None, "robots": {}},
            "tunnel": "up",
        }
        assert server.get("/metadata")[0] == 401
        status, _, body = server.post("/act", build_body())
        assert status == 401 and "/t/TOKEN/act" in json.loads(body)["error"]
        assert server.post("/act", build_body(), {"Authorization": f"Bearer {TOKEN}"})[0] == 200
        assert server.post(f"/t/{TOKEN}/act", build_body())[0] == 200
        assert server.post(f"/t/{TOKEN}/s/left/act", build_body())[0] == 200
        assert server.post(f"/t/{TOKEN}/s/left/reset")[0] == 200
        assert server.get(f"/t/{TOKEN}/metadata")[0] == 200
        assert server.post(f"/t/{TOKEN}x/reset")[0] == 401
        status, _, body = server.get(f"/t/{TOKEN}/nowhere")
        assert status == 404 and TOKEN not in body.decode()
    assert "route=/act" in caplog.text and TOKEN not in caplog.text


def test_over_http_an_address_is_let_in_or_not():
    for networks, status in (("127.0.0.0/8", 200), ("10.0.0.0/8", 403)):
        with serve(settings=ServerSettings(gate=Gate(None, parse_networks(networks)))) as server:
            assert server.post("/act", build_body())[0] == status


def test_a_rate_limit_never_touches_a_reset():
    with serve(settings=ServerSettings(rate_limit=0.001)) as server:
        assert [server.post("/act", build_body())[0] for _ in range(6)] == [200] + [429] * 5
        assert {server.post("/reset")[0] for _ in range(6)} == {200}


def test_a_rate_limit_fills_up_again():
    now = [0.0]
    limit = RateLimit(2, lambda: now[0])
    limit.check("a"), limit.check("a")
    with pytest.raises(RequestError) as caught:
        limit.check("a")
    assert caught.value.status == 429
    limit.check("b")
    now[0] += 0.5
    limit.check("a")
    with pytest.raises(RequestError):
        limit.check("a")
    now[0] += 3600.0  # an hour's rest saves up no more than a burst
    limit.check("a"), limit.check("a")
    with pytest.raises(RequestError):
        limit.check("a")


def test_a_prefix():
    with serve(settings=ServerSettings(prefix="/robots")) as server:
        for path in ("/robots/act", "/act", "/robots/s/left/act"):
            assert server.post(path, build_body())[0] == 200


def test_a_token_is_in_no_line_about_a_client_that_hung_up(caplog):
    caplog.set_level(logging.INFO)
    body = build_body()
    with serve(settings=ServerSettings(gate=Gate("correct-horse"))) as server:
        server.engine.gate.clear()
        with socket.create_connection(("127.0.0.1", server.port)) as hasty:
            head = f"POST /t/correct-horse/s/arm/act HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            hasty.sendall(head.encode() + body)
            until(lambda: server.engine.requests)
            address = hasty.getsockname()
        until(lambda: address not in [each.addr for each in list(server.http._sockets.values())])
        server.engine.gate.set()
        until(lambda: "disconnected while serving /act" in caplog.text)
    assert "correct-horse" not in caplog.text
