"""An OpenAI-compatible server in this process, with every bad habit seen in real ones.

It has a true, if tiny, language model (fake_model.py), restricted to what the constraint allows. So
answers, log-probabilities and seeds can be checked against exact numbers.
"""

import json
import re
import threading
import time
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from tests.engines.fake_model import END, cut_words, list_next, weigh_next

_KINDS = ("vllm", "sglang", "llama", "hosted", "deaf")
_STATUS = {"401": 401, "404": 404, "429": 429, "500": 500}
# habit -> (fields of a body, the status and sentence it is refused with)
_REFUSED_FIELDS = {
    "refuses_logprobs": ("logprobs", 400, "logprobs are not supported with this model"),
    "refuses_logprobs_by_500": ("logprobs", 500, "internal error"),
    "refuses_new_limit": ("max_completion_tokens", 422, "extra fields not permitted"),
}
_GARBLED = (
    {"tokens": ["move"], "token_logprobs": [-0.1]},
    {"content": [{"token": "move"}]},
    {"content": [{"token": "move", "logprob": "much"}]},
    {"content": [{"token": "move", "logprob": float("nan")}]},
    {"content": [{"token": "move", "logprob": 3.0}]},
    {"content": [{"token": "move", "logprob": -0.1, "bytes": [700]}]},
    [],
)
_OLD_DEFAULT = 6  # tokens, of a server that does not know the new limit


class FakeServer:
    """Listens on 127.0.0.1. kind: whose constraint fields it knows. habit: see `_Handler._misbehave`.

    drips: a test of a question's body; what it picks is answered a space at a time, without end.
    slow_s: time an answer takes. bodies: the questions it was asked, in order. most_at_once: of them.
    gather: keep what is asked from now on until so many are there.
    """

    def __init__(self, kind: str = "vllm", model: str = "tiny", port: int = 0):
        assert kind in _KINDS
        self.kind, self.model = kind, model
        self.habit, self.slow_s = "", 0.0
        self.drips = lambda body: False
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
    has_failed = False  # with 500, after which uvicorn closes the connection without saying so

    def log_message(self, *_):
        pass

    @property
    def fake(self) -> FakeServer:
        return self.server.fake

    def do_GET(self):
        if self.fake.habit == "drips_models":
            return self._drip()
        if self.fake.habit == "no_list":  # transformers' without a cache of the hub
            return self._send(500, {"error": "Internal Server Error"})
        models = [] if self.fake.habit == "lists_none" else [{"id": self.fake.model, "object": "model"}]
        self._send(200, {"object": "list", "data": models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.has_failed:
            return self._drop()
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
            self._drop()
        elif habit == "drips" or self.fake.drips(body):
            self._drip()
        elif habit == "html":
            self._send_bytes(200, b"<html>Welcome to nginx!</html>", "text/html")
        elif habit in _REFUSED_FIELDS and _REFUSED_FIELDS[habit][0] in body:
            field, status, reason = _REFUSED_FIELDS[habit]
            self._send(status, {"detail": [{"loc": ["body", field], "msg": reason}]})
        elif habit == "refuses_all" or (habit == "refuses_free" and "structured_outputs" not in body):
            self._send(422, {"detail": [{"loc": ["body", "model"], "msg": "pictures are not allowed"}]})
        elif habit == "five" and body.get("top_logprobs", 0) > 5:
            self._send(400, {"error": {"message": "top_logprobs of 20 is greater than max allowed: 5"}})
        elif habit == "too_many" and len(json.dumps(body)) > 20_000:
            self._send(400, {"error": {"message": "Enum has more values than are allowed"}})
        else:
            return False
        return True

    def _drop(self):
        self.connection.shutdown(2)
        self.close_connection = True

    def _drip(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(2000):
            self.wfile.write(b" ")
            time.sleep(0.02)

    def _complete(self, body) -> dict:
        sentences, wrap = _read_constraint(self.fake.kind, body)
        habit = self.fake.habit
        new_limit = None if habit == "old_limit" else body.get("max_completion_tokens")
        limit = new_limit or body.get("max_tokens") or (_OLD_DEFAULT if habit == "old_limit" else 1000)
        num_top = min(body.get("top_logprobs", 0), 5 if habit == "clips" else 20)
        if sentences is None or habit == "ignores":
            words = cut_words("Sure! The picture shows a grey square.")[:limit]
            rest = [{"token": f" word{i}", "logprob": -3.0 - i} for i in range(num_top - 1)]
            said = [{"token": word, "logprob": -1.0} for word in words]
            entries = [token | {"top_logprobs": [token, *rest]} for token in said]
            finish = "length" if len(words) == limit else "stop"
            return _build_answer("".join(words), finish, entries if body.get("logprobs") else [])
        picture = _find_picture(body)
        words, entries = _decode(picture, sentences, num_top, masked=habit != "raw_logprobs")
        if len(words) >= limit:
            return _build_answer("".join(words[:limit]), "length", entries[:limit])
        said = "".join(words)
        if habit == "leaves":
            said = "fly away"
        if habit == "truncates":
            return _build_answer(said[: len(said) // 2], "length", entries)
        if habit == "no_end":
            entries = entries[:-1]
        if habit in ("null_end", "null_masked"):
            _write_nulls(entries, num_top, ends=habit == "null_end")
        if habit == "no_logprobs" or not body.get("logprobs") or wrap:
            entries = []
        text = json.dumps({"answer": said}, indent=1 if habit == "spaces" else None) if wrap else said
        answer = _build_answer(text, "stop", entries)
        if habit.startswith("garbled"):
            answer["choices"][0]["logprobs"] = _GARBLED[int(habit[-1])]
        return answer

    def _send(self, status, value):
        self.has_failed = status == 500
        self._send_bytes(status, json.dumps(value).encode(), "application/json")

    def _send_bytes(self, status, data, content_type):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _build_answer(text: str, finish: str, entries: list) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"completion_tokens": len(cut_words(text))}
    return {
        "id": "x",
        "object": "chat.completion",
        "usage": usage,
        "choices": [choice | {"logprobs": {"content": entries}}],
    }


def _find_picture(body) -> str:
    parts = body["messages"][0]["content"]
    return next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")


def _write_nulls(entries: list[dict], num_top: int, ends: bool) -> None:
    """As SGLang does for what a constraint masks. ends: leave the end token out, and give it null where it is said."""
    for entry in entries:
        top = entry["top_logprobs"]
        if ends:
            top[:] = [other for other in top if other["token"] != END]
            entry["logprob"] = None if entry["token"] == END else entry["logprob"]
        top += [{"token": f"<unused{i}>", "bytes": None, "logprob": None} for i in range(num_top - len(top))]


def _decode(picture: str, sentences: list[str], num_top: int, masked: bool) -> tuple[list[str], list[dict]]:
    """Greedy words, and the log-probabilities an API reports of them."""
    words, entries = [], []
    while not words or words[-1] != END:
        choices = list_next(sentences, words)
        weights = weigh_next(picture, words, choices)
        reported = weights if masked else weights * 1e-3
        order = np.argsort(-weights, kind="stable")
        top = [{"token": choices[i], "bytes": None, "logprob": float(np.log(reported[i]))} for i in order]
        entries.append(top[0] | {"top_logprobs": top[:num_top]})
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
