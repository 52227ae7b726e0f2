"""A websocket door on a free port, and frames in the bytes of its clients: OpenPI's and vla-eval's."""

import io
from contextlib import contextmanager

import msgpack
import numpy as np
from PIL import Image

from tests.serving import IMAGE, serve
from vlm_local.server.serve import bind
from vlm_local.server.websocket import WebsocketDoor

STATE = np.array([0.3, 0.0, 0.15, 0.0, 0.1, 0.0, 1.0])


@contextmanager
def open_door(horizon=1, listener=None, **serving):
    with serve(**serving) as served:
        door = WebsocketDoor(served.service, listener or bind("127.0.0.1", 0), horizon)
        try:
            yield served, f"ws://127.0.0.1:{door.port}"
        finally:
            door.close()


def openpi_array(array):
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


def openpi_observation(**changes):
    fields = {"observation/image": openpi_array(IMAGE), "observation/state": openpi_array(STATE), "prompt": "lift it"}
    return msgpack.packb({**fields, **changes})


def vla_eval(kind, payload, seq=0):
    return msgpack.packb({"type": kind, "payload": payload, "seq": seq, "timestamp": 1.5})


def vla_eval_observation(seq, **changes):
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    picture = {"__image__": True, "format": "png", "data": file.getvalue(), "shape": IMAGE.shape}
    return vla_eval(
        "observation", {"images": {"wrist": picture, "agentview": picture}, "task_description": "go", **changes}, seq
    )


def read_openpi(answer):
    return np.frombuffer(answer[b"data"], answer[b"dtype"]).reshape(answer[b"shape"])


def port_of(url):
    return int(url.rsplit(":", 1)[1])
