"""A policy server over a scripted engine on a free port, and clients that speak to it in bytes."""

import http.client
import json
import random
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from vlm_local.engines.scripted import ScriptedEngine
from vlm_local.engines.worker import EngineWorker
from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy import Settings, VLMPolicy
from vlm_local.prompts import load_template
from vlm_local.server.app import create_app
from vlm_local.server.serve import HTTPServer, bind
from vlm_local.server.service import ServerSettings
from vlm_local.wire import encode_array

GRAMMAR = load_phrase_grammar()
PHRASE = "move forward up, open gripper"
ACTION = [0.0125, 0, 0.0125, 0, 0, 0, 1]
IMAGE = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
PROPRIO = [0.3, 0.0, 0.15, 0.0, 0.1, 0.0, 0.0, 0.39]


class SteeredEngine(ScriptedEngine):
    """Says PHRASE, unless told otherwise: raises `fault`, waits for `gate`, or says `phrase`."""

    def __init__(self, max_batch: int = 8):
        super().__init__(lambda request: np.array([s == self.phrase for s in request.sentences]), "steered")
        self.max_batch = max_batch
        self.phrase = PHRASE
        self.fault: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.requests = []
        self.batch_sizes = []

    def generate(self, requests):
        self.batch_sizes.append(len(requests))
        self.requests.extend(requests)
        self.gate.wait(60)
        if self.fault is not None:
            raise self.fault
        return super().generate(requests)


class Policies:
    """Policies of one engine, as the command line wires them."""

    answerer = None

    def __init__(self, engine, deadline_ms=None, **settings):
        self.worker = EngineWorker(engine if callable(engine) else lambda: engine, deadline_ms)
        self._settings = Settings(**settings)

    @property
    def metadata(self):
        return {"model": "steered", **self.worker.metadata}

    def build(self, robot, tell_all=False):
        worker, template = self.worker, load_template("chat")
        return VLMPolicy(worker.generate, GRAMMAR, template, self._settings, robot=robot, forget=worker.forget)


@dataclass
class Served:
    http: HTTPServer
    engine: ScriptedEngine
    records: list

    @property
    def port(self):
        return self.http.port

    @property
    def url(self):
        return self.http.url

    @property
    def service(self):
        return self.http.service

    def post(self, path, body=b"", headers=None):
        return ask(self.port, "POST", path, body, headers)

    def get(self, path, headers=None):
        return ask(self.port, "GET", path, None, headers)

    def newest_record(self):
        """Of what was published before now; it comes out in a thread of its own."""
        until(lambda: self.service.subscriptions[0]._num_bytes == 0)
        return self.records[-1]

    def act(self, path="/act?details=1", **fields):
        """An /act that must succeed -> its JSON."""
        status, _, body = self.post(path, build_body(**fields))
        assert status == 200, body
        return json.loads(body)


@contextmanager
def serve(engine=None, settings=None, deadline_ms=None, **policy_settings):
    engine = SteeredEngine() if engine is None else engine
    policies = Policies(engine, deadline_ms, **policy_settings)
    records = []
    app = create_app(policies, settings or ServerSettings())
    app.extensions["vlm_local"].subscribe(records.append)
    server = HTTPServer(app, bind("127.0.0.1", 0))
    try:
        if not callable(engine):
            policies.worker.wait_loaded(60)
        yield Served(server, engine, records)
    finally:
        if isinstance(engine, SteeredEngine):
            engine.gate.set()
        policies.worker.close()
        server.service.drain(2)
        server.stop()


def build_body(image=IMAGE, instruction="put the eggplant in the basket", proprio=PROPRIO, **more) -> bytes:
    """A request as AutoEval's client writes it."""
    proprio = None if proprio is None else encode_array(np.array(proprio, np.float64))
    return json.dumps({"image": encode_array(image), "instruction": instruction, "proprio": proprio, **more}).encode()


def ask(port, method, path, body=None, headers=None):
    """One exchange on a connection of its own -> status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def exchange(port, data: bytes) -> bytes:
    """Send raw bytes, read one answer."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(data)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> bytes:
    """All that comes until its body is whole or the server closes."""
    answer = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            answer += part
            head, end, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            if end and length and len(body) >= int(length[1]):
                break
    return answer


def find_free_port() -> int:
    """For who cannot be given port 0. Not one of those that the system gives to others meanwhile."""
    while True:
        port = random.randrange(20_000, 30_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port


def until(condition, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
