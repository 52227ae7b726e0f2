"""A model of ours behind an OpenAI-compatible API, in a process that may be killed at any moment.

Speaks as much of it as the engine in engines/openai.py needs: the list of models, and chat
completions restricted to vLLM's `structured_outputs.choice`, without log-probabilities.
Run as `python -m vlm_local.bench.sidecar PORT OPTIONS`, OPTIONS being PolicyOptions as JSON.
"""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import numpy as np
from PIL import Image

from vlm_local.assembly import open_policies
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import VLMLocalError
from vlm_local.policy_options import PolicyOptions
from vlm_local.types import GenerationRequest, Prompt

NAME = "sidecar"  # whatever the model is: a server that is told "random" would draw by itself


class Sidecar(ThreadingHTTPServer):
    """Serves `worker`'s engine under NAME."""

    daemon_threads = True

    def __init__(self, port: int, worker: EngineWorker):
        super().__init__(("127.0.0.1", port), _Handler)
        self.worker = worker


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})

    def do_POST(self) -> None:
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = _read_request(body)
        except (KeyError, TypeError, ValueError) as error:
            return self._send(400, {"error": {"message": f"not a request this sidecar takes: {error!r}"}})
        try:
            sentence = cast(Sidecar, self.server).worker.generate(request).sentence
        except VLMLocalError as error:
            return self._send(500, {"error": {"message": str(error)}})
        choice = {"index": 0, "message": {"role": "assistant", "content": sentence}, "finish_reason": "stop"}
        answer = {"id": "answer", "object": "chat.completion", "created": 0, "model": NAME}
        self._send(200, {**answer, "choices": [choice]})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not a line a request."""


def _read_request(body: dict[str, Any]) -> GenerationRequest:
    """A chat completion's body -> what our engine is asked. Raises KeyError, TypeError or ValueError."""
    choices = tuple(body["structured_outputs"]["choice"])
    before, after, image = "", "", None
    for part in body["messages"][0]["content"]:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2], validate=True)
            image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        elif image is None:
            before = part["text"].strip()
        else:
            after = part["text"].strip()
    if image is None:
        raise ValueError("there is no image")
    return GenerationRequest(image, Prompt(before, after), choices)


def main() -> None:
    port, options = int(sys.argv[1]), PolicyOptions(**json.loads(sys.argv[2]))
    policies = open_policies(options)
    worker = policies.worker
    assert worker is not None  # the options name a model
    worker.wait_loaded()
    Sidecar(port, worker).serve_forever()


if __name__ == "__main__":
    main()
