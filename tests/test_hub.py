"""`fetch` against a hub of our own: the API and the files as huggingface.co serves them."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

from tests import recordings
from tests.slow import slow
from tests.tiny_models import tiny_checkpoint

QWEN, PALIGEMMA = "Qwen/Qwen2-VL-2B-Instruct", "google/paligemma2-3b-mix-224"
DATA_SET = "someone/drawers"
COMMIT = "5" * 40


class Hub(ThreadingHTTPServer):
    """Holds one repository, and a gated one. cut: bytes of the weights after which the connection breaks, once."""

    request_queue_size = 64  # files are fetched eight at a time

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        found = [path for path in folder.rglob("*") if path.is_file()]
        self.files = {str(path.relative_to(folder)): path.read_bytes() for path in found}
        self.files["extra.onnx"] = b"of no use here"
        self.cut: int | None = None
        self.asked: list[tuple[str, str, str | None]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        hub, path = self.server, unquote(urlparse(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if PALIGEMMA in path:
            error = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
            self._send(403, b"{}", error)
        elif re.match(f"/api/(models/{QWEN}|datasets/{DATA_SET})/tree/", path):
            files = [{"type": "file", "path": name, "size": len(data), "oid": ""} for name, data in hub.files.items()]
            self._send(200, json.dumps(files).encode())
        elif path.startswith((f"/api/models/{QWEN}", f"/api/datasets/{DATA_SET}")):
            files = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            self._send(200, json.dumps({"id": QWEN, "sha": COMMIT, "siblings": files}).encode())
        elif (name := path.partition(f"/resolve/{COMMIT}/")[2]) in hub.files:
            data = hub.files[name]
            begin = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].split("-")[0])
            etag = hashlib.sha1(data).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            self._send(206 if begin else 200, data[begin:], headers)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut
        if cut is not None and len(body) > cut:
            self.server.cut = None
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
        else:
            with suppress(OSError):
                self.wfile.write(body)


@pytest.fixture
def hub():
    with Hub(tiny_checkpoint("qwen2-vl")) as hub:
        yield hub
        hub.shutdown()


@pytest.fixture
def run(hub, tmp_path):
    """Run a command that knows no hub but this one."""

    def run(*command, **changed):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        environment |= changed
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run(
            [sys.executable, "-m", "vlm_local", *command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_a_model_is_fetched_once_and_only_what_it_needs(run, hub):
    hub.files |= {f"checkpoint-500/{name}": data for name, data in hub.files.items()}
    hub.files["consolidated.safetensors"] = b"the same weights in Mistral's own format"
    first = run("fetch", "qwen2-vl")
    assert first.returncode == 0, first.stderr
    assert f"Downloading {QWEN}" in first.stderr
    folder = first.stdout.split()[-1]
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with open(os.path.join(folder, name), "rb") as file:
            assert file.read() == hub.files[name]
    useless = ("extra.onnx", "checkpoint-500", "consolidated")
    assert not any(name in path for _, path, _ in hub.asked for name in useless)
    num_asked = len(hub.asked)
    again = run("fetch", "qwen2-vl")
    assert again.returncode == 0 and again.stdout == first.stdout
    assert len(hub.asked) == num_asked  # the second time nobody is asked


def _configure(hub, **changes):
    hub.files["config.json"] = json.dumps(json.loads(hub.files["config.json"]) | changes).encode()


def _move(hub, pattern, replacement):
    hub.files = {re.sub(pattern, replacement, name): data for name, data in hub.files.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hub: _configure(hub, model_type="molmo"), r"model_type 'molmo'; .* --engine openai"),
        slow(lambda hub: _configure(hub, quantization_config={"quant_method": "modelopt"}), "quant_method 'modelopt'"),
        slow(
            lambda hub: _move(hub, "model.safetensors", "pytorch_model.bin"), "it has pytorch_model.bin, which can run"
        ),
        slow(lambda hub: _move(hub, "tokenizer.json", "tekken.json"), "no tokenizer .* tekken.json is Mistral's own"),
        slow(lambda hub: _move(hub, "^", "checkpoint-500/"), r"hf download .*'checkpoint-500/\*' --local-dir NAME"),
    ],
)
def test_a_model_that_is_not_understood_is_refused_before_its_weights_are_fetched(change, said, run, hub):
    change(hub)
    ended = run("fetch", "qwen2-vl")
    assert ended.returncode == 2 and re.search(said, ended.stderr), ended.stderr
    assert not any("safetensors" in path for _, path, _ in hub.asked)


@pytest.mark.slow
def test_a_download_that_was_cut_off_goes_on(run, hub):
    hub.cut = len(hub.files["model.safetensors"]) // 2
    ended = run("fetch", "qwen2-vl")
    if ended.returncode:  # huggingface_hub may try again by itself, or leave that to us
        assert "Traceback" not in ended.stderr
        ended = run("fetch", "qwen2-vl")
    assert ended.returncode == 0, ended.stderr
    with open(os.path.join(ended.stdout.split()[-1], "model.safetensors"), "rb") as file:
        assert file.read() == hub.files["model.safetensors"]
    assert hub.cut is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("paligemma2", "licence"), slow(f"{PALIGEMMA}-mine", "licence"), ("someone/nothing", "does not give it")],
)
def test_what_the_hub_refuses_is_a_paragraph(run, name, sentence):
    ended = run("fetch", name)
    assert ended.returncode == 2
    assert sentence in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_data_set_is_read_by_its_name(run, tmp_path):
    recordings.write_lerobot(tmp_path / "lerobot", [recordings.make_states(8, 0)], "v3.0", "image")
    command = ("label", f"lerobot:{DATA_SET}", "--out", "labels.jsonl")
    with Hub(tmp_path / "lerobot") as hub:
        first = run(*command, HF_ENDPOINT=hub.url)
        hub.shutdown()
    assert first.returncode == 0, first.stderr
    labels = (tmp_path / "labels.jsonl").read_text()
    assert len(labels.splitlines()) == 8
    again = run(*command, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")  # from the cache; nobody listens any more
    assert again.returncode == 0 and (tmp_path / "labels.jsonl").read_text() == labels
    missing = run("label", "lerobot:someone/nothing", "--out", "others.jsonl")
    assert missing.returncode == 2 and "hf download someone/nothing --repo-type dataset" in missing.stderr
