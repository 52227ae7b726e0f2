import base64
import io
import json
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.server.observing import observe
from tests.serving import IMAGE, PHRASE, ask, build_body, exchange, serve, until
from vlm_local.client import PolicyClient
from vlm_local.errors import EngineError
from vlm_local.server.access import Gate, is_known_host
from vlm_local.server.live import MAX_VIEWERS
from vlm_local.server.service import ServerSettings

JSON = {"Content-Type": "application/json"}


class Viewer:
    """An open stream of events."""

    def __init__(self, server, path="/live/events"):
        self._answer = urllib.request.urlopen(server.url + path, timeout=60)
        self.headers = self._answer.headers

    def read(self, wanted: str):
        """The next event of this name -> its data."""
        name = None
        for line in self._answer:
            key, _, value = line.decode().rstrip("\n").partition(": ")
            if key == "event":
                name = value
            elif key == "data" and name == wanted:
                return json.loads(value)
        raise EOFError

    def close(self):
        self._answer.close()


def _try(server, image=IMAGE, headers=JSON, **fields):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    body = json.dumps({"image": url, "instruction": "lift the cup", **fields}).encode()
    status, _, answer = server.post("/live/try", body, headers)
    return status, json.loads(answer)


def test_a_viewer_sees_what_was_and_what_comes(tmp_path):
    with observe(tmp_path) as server:
        server.act("/s/left/act?details=1")
        until(lambda: server.observed.report_recording()["written"] == 1)
        viewer = Viewer(server)
        assert viewer.headers["Content-Type"].startswith("text/event-stream")
        snapshot = viewer.read("snapshot")
        assert [step["phrase"] for step in snapshot["robots"]["left"]] == [PHRASE]
        server.act("/s/right/act?details=1")
        step = viewer.read("step")
        assert (step["robot"], step["phrase"], step["episode"], step["step"]) == ("right", PHRASE, 0, 0)
        assert step["marginals"]["x"] == [0, 0, 1] and step["instruction"] and len(step["proprio"]) == 7
        server.engine.fault = EngineError("out of memory")
        server.act()
        assert viewer.read("step")["fault"] == "out of memory"
        server.post("/act", b"{")
        status = viewer.read("status")
        while not status["refusals"]:
            status = viewer.read("status")
        assert (status["steps"], status["episodes"], status["faults"]) == (3, 3, 1)
        assert status["state"] == "healthy" and status["recording"]["lost"] == 0
        assert "not complete JSON" in status["last_refusal"]
        viewer.close()


def test_streams_end_at_once_when_the_server_stops(monkeypatch):
    monkeypatch.setattr("vlm_local.server.live._STATUS_EVERY_S", 3600)  # it does not end because this comes
    with observe() as server:
        viewer = Viewer(server)
        viewer.read("snapshot")
        server.observed.end_streams()
        with pytest.raises(EOFError):
            viewer.read("never")


def test_viewers_have_their_places_and_give_them_back_while_robots_are_served():
    with observe() as server:
        viewers = [Viewer(server) for _ in range(MAX_VIEWERS)]
        assert server.get("/live/events")[0] == 503
        assert server.get("/health")[0] == 200
        assert server.act()["phrase"] == PHRASE
        for viewer in viewers:
            viewer.close()
        until(lambda: _is_free(server))


def test_the_page_shows_so_many_robots_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr("vlm_local.server.live.MAX_SHOWN", 2)
    with observe() as server:
        for name in ("a", "b", "a", "c"):
            server.act(f"/s/{name}/act?details=1")
        until(lambda: server.get("/live/frame/c")[0] == 200)
        assert [server.get(f"/live/frame/{name}")[0] for name in "abc"] == [200, 404, 200]
        viewer = Viewer(server)
        assert set(viewer.read("snapshot")["robots"]) == {"a", "c"}
        viewer.close()


def test_streams_that_nobody_reads_take_no_place():
    with observe() as server:
        for _ in range(2 * MAX_VIEWERS):
            assert ask(server.port, "HEAD", "/live/events")[0] == 200
        until(lambda: _is_free(server))


def _is_free(server) -> bool:
    try:
        viewer = Viewer(server)
    except OSError:
        return False
    viewer.close()
    return True


def test_a_frame_is_what_the_robot_saw_last():
    with observe() as server:
        assert server.get("/live/frame/robot")[0] == 404
        server.act()
        until(lambda: server.get("/live/frame/robot")[0] == 200)
        _, headers, png = server.get("/live/frame/robot?format=png")
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(png))), IMAGE)
        jpeg = server.get("/live/frame/robot")[2]
        assert Image.open(io.BytesIO(jpeg)).size == (256, 256) and headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("folder", ["absolute", "relative"])
def test_past_episodes_can_be_browsed(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with observe(tmp_path / "runs" if folder == "absolute" else Path("runs")) as server:
        server.act()
        server.act()
        server.post("/reset")
        server.act(instruction="open the drawer")
        until(lambda: server.observed.report_recording()["written"] == 3)
        listed = json.loads(server.get("/live/episodes")[2])
        found = {episode["id"]: episode for episode in listed["episodes"]}
        assert {name: episode["num_steps"] for name, episode in found.items()} == {"robot-0": 2, "robot-1": 1}
        assert found["robot-1"]["instruction"] == "open the drawer"
        steps = json.loads(server.get("/live/episodes/0/robot-0")[2])["steps"]
        assert [step["step"] for step in steps] == [0, 1] and steps[1]["phrase"] == PHRASE
        frame = server.get("/live/episodes/0/robot-0/frames/1")[2]
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(frame))), IMAGE)
        for path in (
            "0/robot-7",
            "0/robot-0/frames/9",
            "0/..",
            "0/%2e%2e%2fmeta.json",
            "0/robot-0/frames/-1",
            "1/robot-0",
        ):
            assert server.get(f"/live/episodes/{path}")[0] == 404, path


def test_the_try_it_box_answers_and_leaves_robots_alone(tmp_path):
    with observe(tmp_path) as server:
        server.act()
        status, answer = _try(server)
        assert status == 200 and answer["phrase"] == PHRASE and answer["probability"] == 1
        np.testing.assert_array_equal(server.engine.requests[-1].image, IMAGE)
        assert server.act()["step"] == 1
        until(lambda: server.observed.report_recording()["written"] == 2)
        for wrong in ({"instruction": " "}, {"instruction": None}):
            assert _try(server, **wrong)[0] == 400
        assert _try(server, headers={"Content-Type": "text/plain"})[0] == 415  # what a foreign page may send
        server.engine.fault = EngineError("out of memory")
        assert _try(server)[1]["error"] == "out of memory"


def test_who_tries_while_another_does_is_refused_at_once():
    with observe() as server:
        server.engine.gate.clear()
        first = threading.Thread(target=_try, args=(server,))
        first.start()
        until(lambda: len(server.engine.requests) == 1)
        status, answer = _try(server)
        assert status == 503 and "another picture is being tried" in answer["error"]
        server.engine.gate.set()
        first.join(60)
        assert _try(server)[0] == 200


def test_a_try_is_answered_after_robots_that_wait(monkeypatch):
    monkeypatch.setattr("vlm_local.engines.OTHERS_WAIT_S", 3600.0)
    with observe() as server:
        server.engine.gate.clear()
        asking = [threading.Thread(target=server.act, args=("/s/left/act?details=1",))]
        asking[0].start()
        until(lambda: len(server.engine.requests) == 1)
        asking += [threading.Thread(target=_try, args=(server,)), threading.Thread(target=server.act)]
        for num_waiting, each in enumerate(asking[1:], 1):
            each.start()
            until(lambda num_waiting=num_waiting: server.service.policies.worker.num_waiting == num_waiting)
        server.engine.gate.set()
        for each in asking:
            each.join(60)
        assert server.engine.batch_sizes == [1, 1, 1]
        assert ["lift the cup" in str(request.prompt) for request in server.engine.requests] == [False, False, True]


def test_the_page_lets_nothing_foreign_in():
    with observe() as server:
        for path in ("/", "/static/live.js", "/static/live.css", "/live/episodes", "/live/frame/nobody"):
            _, headers, _ = server.get(path)
            assert "default-src 'none'" in headers["Content-Security-Policy"], path
            assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff"
        page = server.get("/")[2].decode()
        assert "http://" not in page and "https://" not in page and "<script>" not in page and "style=" not in page
        assert server.get("/static/live.js")[1]["Content-Type"].startswith("text/javascript")
        for name in ("..", "../app.py", "%2e%2e%2fapp.py", "nothing.js"):
            assert server.get(f"/static/{name}")[0] == 404


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("192.168.1.20", True),
        ("localhost:8000", True),
        ("robot.localhost", True),
        ("lab-gpu:8000", True),
        ("LAB-GPU.", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_hosts_that_no_rebinding_can_fake(host, known):
    assert is_known_host(host, {"localhost", "lab-gpu"}) is known


EVIL = {"Host": "evil.example"}
ROUTES = ("/", "/live/events", "/live/episodes", "/static/live.js", "/t/anything/", "/health", "/metadata", "/metrics")
POSTS = ("/act", "/reset", "/s/left/reset", "/hold", "/release", "/live/try", "/nothing")


def test_under_a_foreign_host_name_nothing_is_read_but_robots_may_use_any():
    with observe() as server:
        for path in ROUTES:
            status, _, body = server.get(path, EVIL)
            assert status == 403 and b"--host-name" in body, path
        for path in POSTS:  # a rebound page: to the browser it is of the same origin
            assert server.post(path, build_body(), {**EVIL, "Origin": "http://evil.example"})[0] == 403, path
        assert server.post("/act", build_body(), EVIL)[0] == 200  # as a robot behind ngrok asks


def test_our_client_reads_under_any_name():
    with observe() as server:
        own = {"Sec-Vlm-Local": "client"}  # which no page can send
        assert server.get("/metadata", {**EVIL, **own})[0] == 200
        assert server.get("/metadata", {**EVIL, **own, "Origin": "http://evil.example"})[0] == 403
        assert server.get("/metadata", {**EVIL, **own, "Sec-Fetch-Site": "same-origin"})[0] == 403
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", server.port))])
            assert PolicyClient("http://0.tcp.ngrok.example:1").act(IMAGE, "go")["phrase"] == PHRASE


FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://["},
    {"Origin": "http://127.0.0.1:1"},  # another server of this machine
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
]


@pytest.mark.parametrize(("token", "below"), [(None, ""), ("secret-token", "/t/secret-token")])
def test_a_page_of_another_site_can_do_nothing_whatever_it_knows(token, below):
    with observe(settings=ServerSettings(gate=Gate(token))) as server:
        for foreign in FOREIGN:
            before = server.act(f"{below}/act?details=1")
            for path in ROUTES:
                assert server.get(below + path, foreign)[0] == 403, (path, foreign)
            for path in POSTS:
                assert server.post(below + path, build_body(), {**foreign, "Content-Type": "text/plain"})[0] == 403
            assert ask(server.port, "OPTIONS", f"{below}/act", None, foreign)[0] == 403
            after = server.act(f"{below}/act?details=1")
            assert (after["episode"], after["step"], after["fault"]) == (before["episode"], before["step"] + 1, None)


def test_the_own_page_and_a_link_to_it_are_served():
    with observe() as server:
        own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
        behind_a_proxy = {**own, "Origin": "https://gate.example.org"}  # which asks under this server's address
        for headers in (own, behind_a_proxy, {"Origin": server.url}, {"Sec-Fetch-Site": "none"}):
            assert server.post("/act", build_body(), headers)[0] == 200
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        assert server.get("/", link)[0] == 200
        assert server.get("/metadata", link)[0] == server.post("/act", build_body(), link)[0] == 403


@pytest.mark.parametrize(("headers", "status"), [(b"", b"200"), (b"Origin: http://evil.example\r\n", b"403")])
def test_a_request_without_a_host_is_no_failure_of_the_server(headers, status):
    with serve() as server:
        assert exchange(server.port, b"GET /health HTTP/1.0\r\n" + headers + b"\r\n").split()[1] == status


def test_a_machine_may_have_other_names():
    with observe(settings=ServerSettings(names=frozenset({"gate.example.org"}))) as server:
        named = {"Host": "Gate.example.org:8000"}
        assert server.get("/metadata", named)[0] == server.get("/", named)[0] == 200
        assert server.post("/hold", b"", {**named, "Origin": "https://gate.example.org:8000"})[0] == 200
        port = {"Host": "gate.example.org:80", "Origin": "http://gate.example.org"}  # as some proxies write it
        assert server.post("/hold", b"", port)[0] == 200
        assert server.get("/metadata", {"Host": "org"})[0] == 403


def test_with_a_token_the_page_is_below_it_under_any_name():
    settings = ServerSettings(gate=Gate("secret-token"))
    with observe(settings=settings) as server:
        assert server.get("/")[0] == 401 and server.get("/live/events")[0] == 401
        assert server.get("/t/wrong-token/")[0] == 401
        status, headers, _ = server.get("/t/secret-token/", {"Host": "lab.example"})
        assert status == 200
        status, headers, _ = server.get("/t/secret-token")
        assert (status, headers["Location"]) == (302, "secret-token/")  # or relative addresses would miss it
        viewer = Viewer(server, "/t/secret-token/live/events")
        assert viewer.read("snapshot")["robots"] == {}
        viewer.close()
