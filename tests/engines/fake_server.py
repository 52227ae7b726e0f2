"""An OpenAI-compatible server in this process, with every bad habit seen in real ones.

It has a true, if tiny, language model: a distribution over the next word that depends on picture and
words so far, restricted to what the constraint allows. So answers, log-probabilities and seeds can
be checked against exact numbers.
"""

import hashlib
import json
import re
import threading
import time
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

END = "<|im_end|>"
_KINDS = ("vllm", "sglang", "llama", "hosted", "deaf")
_STATUS = {"401": 401, "404": 404, "429": 429, "500": 500}


def cut_words(sentence: str) -> list[str]:
    """The model's tokens: a word with the space before it, or a comma."""
    return re.findall(r" ?[^\s,]+|,", sentence)


def weigh_next(picture: str, words: list[str], choices: list[str], sharpness: float = 1.0) -> np.ndarray:
    """float64 (len(choices),) probabilities of the next word among `choices`."""
    digests = [hashlib.sha256(f"{picture}/{words}/{word}".encode()).digest() for word in choices]
    logits = np.array([int.from_bytes(digest[:4], "big") / 2**31 for digest in digests]) * 3 * sharpness
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def list_next(sentences: list[str], words: list[str]) -> list[str]:
    found = {}
    for sentence in sentences:
        cut = [*cut_words(sentence), END]
        if cut[: len(words)] == words and len(cut) > len(words):
            found[cut[len(words)]] = None
    return list(found)


def weigh_sentences(picture: str, sentences: tuple[str, ...], temperature: float = 1.0) -> np.ndarray:
    """The exact distribution over the sentences: product of the restricted softmax over the words."""
    probabilities = []
    for sentence in sentences:
        product, words = 1.0, []
        for word in [*cut_words(sentence), END]:
            choices = list_next(list(sentences), words)
            weights = weigh_next(picture, words, choices, 1 / temperature)
            product *= weights[choices.index(word)]
            words.append(word)
        probabilities.append(product)
    return np.array(probabilities)


class FakeServer:
    """Listens on 127.0.0.1. kind: whose constraint fields it knows. habit: see `_Handler._misbehave`.

    slow_s: time an answer takes. bodies: the questions it was asked, in order. most_at_once: of them.
    gather: keep what is asked from now on until so many are there.
    """

    def __init__(self, kind: str = "vllm", model: str = "tiny", port: int = 0):
        assert kind in _KINDS
        self.kind, self.model = kind, model
        self.habit, self.slow_s = "", 0.0
        self.most_at_once = 0
        self._barrier = threading.Barrier(1)
        self._inside = 0
        self._lock = threading.Lock()
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self._server = _Listener(("127.0.0.1", port), _Handler)
        self._server.fake = self
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @cached_property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_asked(self) -> int:
        """Questions since the start, without those that only probe or warm up."""
        return sum("What colour is it?" not in json.dumps(body) for body in self.bodies)

    def gather(self, count: int) -> None:
        self._barrier = threading.Barrier(count)

    def wait(self) -> None:
        """Take the time an answer takes."""
        with self._lock:
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
        with suppress(threading.BrokenBarrierError):
            self._barrier.wait(5)
            self._barrier = threading.Barrier(1)
        time.sleep(self.slow_s)
        with self._lock:
            self._inside -= 1

    def close(self) -> None:
        """Stop listening, and drop the connections that are kept alive, as a killed process does."""
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64  # a connection that finds the queue of 5 full is tried again a second later

    def __init__(self, *args):
        super().__init__(*args)
        self._connections = []

    def process_request(self, request, client_address):
        self._connections.append(request)
        super().process_request(request, client_address)

    def drop_connections(self):
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(2)

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def fake(self) -> FakeServer:
        return self.server.fake

    def do_GET(self):
        self._send(200, {"object": "list", "data": [{"id": self.fake.model, "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.fake.bodies.append(body)
        self.fake.keys.append(self.headers.get("Authorization"))
        self.fake.wait()
        if not self._misbehave(body):
            self._send(200, self._complete(body))

    def _misbehave(self, body) -> bool:
        """The habits that end a request before a true answer."""
        habit = self.fake.habit
        if habit in _STATUS:
            self._send(_STATUS[habit], {"error": {"message": f"habit {habit}", "type": "x", "code": habit}})
        elif habit in ("drops", "drops_once"):
            self.fake.habit = "" if habit == "drops_once" else habit
            self.connection.shutdown(2)
            self.close_connection = True
        elif habit == "drips":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "100000")
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b" ")
                time.sleep(0.02)
        elif habit == "html":
            self._send_bytes(200, b"<html>Welcome to nginx!</html>", "text/html")
        elif habit == "refuses_logprobs" and "logprobs" in body:
            self._send(400, {"error": {"message": "logprobs are not supported with this model"}})
        elif habit == "too_many" and len(json.dumps(body)) > 20_000:
            self._send(400, {"error": {"message": "Enum has more values than are allowed"}})
        else:
            return False
        return True

    def _complete(self, body) -> dict:
        sentences, wrap = _read_constraint(self.fake.kind, body)
        habit = self.fake.habit
        if sentences is None or habit == "ignores":
            return _build_answer("Sure! The picture shows a grey square.", "stop", [])
        picture = _find_picture(body)
        words, entries = _decode(picture, sentences, masked=habit != "raw_logprobs")
        said = "".join(words)
        if habit == "leaves":
            said = "fly away"
        if habit == "truncates":
            return _build_answer(said[: len(said) // 2], "length", entries)
        if habit == "no_end":
            entries = entries[:-1]
        if habit == "no_logprobs" or not body.get("logprobs") or wrap:
            entries = []
        text = json.dumps({"answer": said}, indent=1 if habit == "spaces" else None) if wrap else said
        return _build_answer(text, "stop", entries)

    def _send(self, status, value):
        self._send_bytes(status, json.dumps(value).encode(), "application/json")

    def _send_bytes(self, status, data, content_type):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _build_answer(text: str, finish: str, entries: list) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "choices": [choice | {"logprobs": {"content": entries}}]}


def _find_picture(body) -> str:
    parts = body["messages"][0]["content"]
    return next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")


def _decode(picture: str, sentences: list[str], masked: bool) -> tuple[list[str], list[dict]]:
    """Greedy words, and the log-probabilities an API reports of them."""
    words, entries = [], []
    while not words or words[-1] != END:
        choices = list_next(sentences, words)
        weights = weigh_next(picture, words, choices)
        reported = weights if masked else weights * 1e-3
        order = np.argsort(-weights, kind="stable")
        top = [{"token": choices[i], "bytes": None, "logprob": float(np.log(reported[i]))} for i in order[:20]]
        entries.append(top[0] | {"top_logprobs": top})
        words.append(choices[order[0]])
    return words[:-1], entries


def _read_constraint(kind: str, body) -> tuple[list[str] | None, bool]:
    """The sentences that a server of this kind understands it may say, and whether inside JSON."""
    if kind == "vllm" and "structured_outputs" in body:
        ((name, value),) = body["structured_outputs"].items()
        if name == "json":
            return value["properties"]["answer"]["enum"], True
        return {"choice": lambda: value, "regex": lambda: _read_regex(value), "grammar": lambda: _read_ebnf(value)}[
            name
        ](), False
    if kind == "sglang" and "regex" in body:
        return _read_regex(body["regex"]), False
    if kind == "sglang" and "ebnf" in body:
        return _read_ebnf(body["ebnf"]), False
    if kind == "llama" and "grammar" in body:
        return _read_ebnf(body["grammar"]), False
    if kind == "hosted" and "response_format" in body:
        return body["response_format"]["json_schema"]["schema"]["properties"]["answer"]["enum"], True
    return None, False


def _read_regex(text: str) -> list[str]:
    assert text[0] == "(" and text[-1] == ")"
    return [re.sub(r"\\(.)", r"\1", part) for part in re.split(r"(?<!\\)\|", text[1:-1])]


def _read_ebnf(text: str) -> list[str]:
    assert text.startswith("root ::= ")
    return [json.loads(quoted) for quoted in re.findall(r'"(?:[^"\\]|\\.)*"', text)]
