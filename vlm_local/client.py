"""A policy over HTTP. This one file with numpy and Python 3.8 or later is all that a robot's own
environment needs.

`PolicyClient` speaks AutoEval's protocol to any server of it (remote_policy.py makes it a Policy of
this package). `Detector` stands in for AutoEval's own success detector.
"""

import base64
import contextlib
import http.client
import json
import os
import re
import selectors
import socket
import struct
import threading
import time
import zlib
from urllib.parse import urlsplit

import numpy as np

# AutoEval's 8 numbers measure the gripper's opening as 0..0.39.
_AUTOEVAL_GRIPPER_RANGE = 0.39

_MAX_ANSWER = 2**22  # bytes; our own largest has a few thousand
# What a server says that does not know a route. A proxy before one of ours says 502 while it starts.
_NO_SUCH_ROUTE = (404, 405, 501)
# No page in a browser can send a header that begins with "Sec-", so a server of ours knows that it may answer
# under whatever name it was reached (see server/access.py).
_NO_BROWSER = {"Sec-Vlm-Local": "client"}


class PolicyError(Exception):
    """The server could not be reached, refused, or answered what is no action.

    status: the HTTP status, None where no whole answer came.
    """

    def __init__(self, message, status=None):
        super().__init__(message)
        self.status = status


class PolicyClient:
    """One robot's connection, kept alive between requests. Not thread-safe."""

    def __init__(self, url, timeout_s=30.0):
        """url: of the server, with the path of a token (/t/TOKEN) or robot (/s/NAME) where it has one.

        timeout_s: for a whole exchange, from the first byte sent to the last one read.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}")
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = make(parts.hostname, parts.port, timeout=timeout_s)
        self._timeout_s = timeout_s
        self._path = parts.path.rstrip("/")
        # As it may be shown and kept: without password and token.
        shown = re.sub(r"/t/[^/]+", "/t/***", self._path)
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{shown}"
        self._metadata = None

    @property
    def metadata(self):
        """What the server says of itself; {} for a server that has no /metadata. Asked until it is answered."""
        if self._metadata is None:
            try:
                found = _read_json(self.request("GET", "/metadata"))
            except PolicyError as error:
                if error.status not in (*_NO_SUCH_ROUTE, 400, 410, 422):
                    raise
                found = None
            self._metadata = found if isinstance(found, dict) else {}
        return self._metadata

    @property
    def is_vlm_local(self):
        """Whether the server is one of ours: it answers details, takes seeds and 7 numbers of proprio."""
        return self.metadata.get("server") == "vlm-local"

    def reset(self, seed=None):
        """Start an episode. Servers without /reset are left in peace."""
        body = b"" if seed is None or not self.is_vlm_local else json.dumps({"seed": seed}).encode()
        try:
            self.request("POST", "/reset", body)
        except PolicyError as error:
            if error.status not in _NO_SUCH_ROUTE:
                raise

    def act(self, image, instruction, proprio=None):
        """One observation -> dict with "action" float64 (7,), and all details our own server gives.

        image: uint8 (H, W, 3) RGB. instruction: str, or None to keep the episode's.
        proprio: (7,) x, y, z (m), roll, pitch, yaw (rad), gripper 0 closed..1 open, or None.
        """
        payload = {"image": _encode_array(np.asarray(image, np.uint8)), "instruction": instruction}
        if proprio is not None:
            payload["proprio"] = _encode_array(self._lay_out(np.asarray(proprio, np.float64)))
        body = json.dumps(payload).encode()
        if not self.is_vlm_local:
            return {"action": parse_action(self.request("POST", "/act", body, repeatable=False))}
        answer = self.request("POST", "/act?details=1", body, repeatable=False)
        details = _read_json(answer)
        if not isinstance(details, dict):
            raise PolicyError(f"expected an object with details, but the server answered {answer[:200]!r}", 200)
        return {**details, "action": _check_action(details.get("action"), answer)}

    def _lay_out(self, proprio):
        if self.is_vlm_local:
            return proprio
        return np.concatenate([proprio[:6], [0.0, proprio[6] * _AUTOEVAL_GRIPPER_RANGE]])

    def request(self, method, path, body=None, repeatable=True):
        """One exchange -> the answer's bytes. Raises PolicyError for all but a 200.

        repeatable: whether the server may do it twice; it is asked again where a kept connection ended.
        """
        headers = dict(_NO_BROWSER, **({"Content-Type": "application/json"} if body else {}))
        end = time.monotonic() + self._timeout_s
        watch = threading.Timer(self._timeout_s, self._abort)  # the socket's own limit is for each read
        watch.daemon = True
        watch.start()
        try:
            response, data = self._exchange(method, self._path + path, body, headers, repeatable, end)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            reason = "timed out" if time.monotonic() >= end else str(error) or type(error).__name__
            raise PolicyError(f"{self.url}{path} gave no answer ({reason}); is the server running?") from None
        finally:
            watch.cancel()
        if response.status != 200:
            raise PolicyError(f"{self.url}{path} answered {response.status}: {_read_reason(data)}", response.status)
        return data

    def _exchange(self, method, path, body, headers, repeatable, end):
        if self._connection.sock is not None and _has_ended(self._connection.sock):
            self._connection.close()
        was_open, is_sent = self._connection.sock is not None, False
        try:
            self._connection.request(method, path, body, headers)
            is_sent = True
            response = self._connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):
            self._connection.close()
            # A request that was not sent whole is not done. One that was may be: the server can have died of it.
            if not was_open or (is_sent and not repeatable) or time.monotonic() >= end:
                raise
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        data = response.read(_MAX_ANSWER + 1)
        if len(data) > _MAX_ANSWER:
            raise http.client.HTTPException(f"its answer has more than {_MAX_ANSWER} bytes")
        if response.length:  # the body ended before its announced length
            raise http.client.IncompleteRead(data, response.length)
        return response, data

    def _abort(self):
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._connection.close()


def _has_ended(sock):
    """Whether an idle connection was closed by the other side: then there is something to read."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def parse_action(body):
    """An answer of any AutoEval-protocol server (list, json_numpy array, or either as a string) -> (7,)."""
    value = _read_json(body)
    if isinstance(value, str):
        value = _read_json(value)
    if isinstance(value, dict) and "__numpy__" in value:
        try:
            data = base64.b64decode(value["__numpy__"])
            value = np.frombuffer(data, np.dtype(value["dtype"])).reshape(value["shape"])
        except (ValueError, TypeError, KeyError, OverflowError, SyntaxError):
            value = None
    return _check_action(value, body)


def _check_action(value, body):
    try:
        action = np.asarray(value)
        # Text that reads like numbers is none: AutoEval's clipping would raise.
        action = np.asarray(action, np.float64) if action.dtype.kind in "iuf" else np.empty(0)
    except (ValueError, TypeError):
        action = np.empty(0)
    if action.shape != (7,) or not np.isfinite(action).all():
        raise PolicyError(f"expected 7 finite numbers, but the server answered {body[:200]!r}", 200)
    return action


def _read_json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _encode_array(array):
    data = base64.b64encode(np.ascontiguousarray(array).data).decode("ascii")
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def _read_reason(data):
    answer = _read_json(data)
    if isinstance(answer, dict) and "error" in answer:
        return str(answer["error"])[:500]
    return data[:200].decode("utf-8", "replace")


class Detector:
    """AutoEval's success detector, with a vlm-local server's /answer behind it.

    In a station: `detectors["vlm_local"] = Detector`, success_detector_type "vlm_local" and
    vlm_config {"url": "http://127.0.0.1:8000"}.
    """

    TRIES = 3
    PAUSE_S = 2.0

    def __init__(self, url, choices=None, threshold=0.0, save_data=False, save_dir=None, timeout_s=30.0):
        """choices: what may be answered; by default what the question names after its last "answer".

        threshold: the probability that an expected answer needs to count (`eval-answers` finds one).
        save_data, save_dir: keep each image and result as AutoEval's detectors do.
        """
        if save_data and save_dir is None:
            raise ValueError("save_data needs a save_dir to save to")
        self._client = PolicyClient(url, timeout_s)
        self._choices = None if choices is None else list(choices)
        self._threshold = threshold
        self._save_dir = save_dir if save_data else None
        self._num_saved = 0
        self.last = None

    def __call__(self, prompt, image, answer=None):
        """The answer as text, or, where `answer` is given, whether it is that.

        prompt: the question. image: uint8 (H, W, 3) RGB, float 0..1 of that shape, or a PIL image.
        `last` keeps the server's whole answer, with the probability of every choice.
        """
        choices = self._choices or read_choices(prompt)
        if answer is not None and answer not in choices:
            raise ValueError(f"{answer!r} is none of the choices {choices}, so it could never be the answer")
        pixels = _as_pixels(image)
        found = self.last = self._ask({"image": _encode_array(pixels), "question": prompt, "choices": choices})
        result = found["answer"]
        if answer is not None:
            result = result == answer and self._is_sure(found["probability"])
        if self._save_dir is not None:
            self._save(self._save_dir, pixels, result)
        return result

    def _is_sure(self, probability):
        if not self._threshold:
            return True
        if probability is None:
            raise PolicyError(f"{self._client.url} gives no probabilities, so no threshold can be held", 200)
        return probability >= self._threshold

    def _ask(self, question):
        """A question changes nothing, so it is asked again where a policy's step is not."""
        body, num_tries = json.dumps(question).encode(), 1
        while True:
            try:
                return self._check(_read_json(self._client.request("POST", "/answer", body)), question["choices"])
            except PolicyError as error:
                if num_tries >= self.TRIES or error.status not in (None, 503):
                    raise
            num_tries += 1
            time.sleep(self.PAUSE_S)

    def _check(self, found, choices):
        if not isinstance(found, dict) or found.get("answer") not in choices:
            raise PolicyError(f"{self._client.url}/answer gave none of the choices, but {str(found)[:200]!r}", 200)
        probability = found.setdefault("probability", None)
        if probability is not None and not (isinstance(probability, (int, float)) and 0 <= probability <= 1.000001):
            raise PolicyError(f"{self._client.url}/answer gave the probability {str(probability)[:200]!r}", 200)
        return found

    def _save(self, folder, pixels, result):
        os.makedirs(folder, exist_ok=True)
        stem = os.path.join(folder, str(self._num_saved))
        with open(stem + "_img.png", "wb") as file:
            file.write(_write_png(pixels))
        with open(stem + "_success.txt", "w") as file:
            file.write(str(result))
        self._num_saved += 1


def read_choices(question):
    """ "... answer sink or basket or invalid" -> ["sink", "basket", "invalid"]."""
    _, mark, tail = question.rpartition("answer ")
    choices = [choice.strip(" .?!\n") for choice in tail.split(" or ")]
    if not mark or len(choices) < 2 or not all(choices):
        raise ValueError(
            f"{question!r} does not end in its choices, as in '... answer yes or no'; name them in choices"
        )
    return choices


def _as_pixels(image):
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.dtype.kind == "f" and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected an RGB image, uint8 (H, W, 3) or float 0..1, got {pixels.dtype} {pixels.shape}")
    return pixels


def _write_png(pixels):
    """uint8 (H, W, 3) -> a PNG file's bytes: one unfiltered, compressed block."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, 3 * width)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
