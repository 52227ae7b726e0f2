"""What websocket clients send and are answered, in OpenPI's dialect, RoboArena's and vla-eval's."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from time import perf_counter
from typing import Any

import numpy as np
from websockets.protocol import State
from websockets.sync.server import ServerConnection

from vlm_local.data.rotations import quaternion_to_matrix
from vlm_local.embodiments.rotations import DOWN, matrix_to_euler
from vlm_local.errors import EngineError, RequestError
from vlm_local.fields import Reserve, check_state, check_text
from vlm_local.server.access import RateLimit
from vlm_local.server.episodes import Step
from vlm_local.server.frames import Spelling, find_spelling, list_names, pack, read_array, read_picture, unpack
from vlm_local.server.peers import Peer
from vlm_local.server.records import Refusal, StepRecord, build_record
from vlm_local.server.service import Service, describe_action
from vlm_local.wire import MAX_INSTRUCTION, Message

logger = logging.getLogger(__name__)

INTERNAL_ERROR = 1011  # of RFC 6455

# What clients call the picture to decide on, the first present counts. Others are wrist cameras or further views.
_IMAGES = (
    *("observation/image", "observation/exterior_image_1_left", "observation/exterior_image_0_left"),
    *("image", "observation.images.image", "observation.images.top"),
)
_CAMERAS = ("3rd_view_camera", "agentview", "image_primary", "primary", "rgb_static", "external_cam", "front")
_STATES = ("observation/state", "state", "states", "observation.state")
_PROMPTS = ("prompt", "task_description", "instruction", "task")
_LIBERO = "vla_eval.benchmarks.libero"  # with its variants libero_plus, libero_pro and libero_mem, which move alike
_TOLD = ("model", "server", "version", "grammar", "action", "steps", "decide", "trained")  # of /metadata, to OpenPI's


class Client:
    """One connection's robot: maps in, steps out."""

    def __init__(self, connection: ServerConnection, peer: Peer, robot: str, service: Service, limit: RateLimit | None):
        self.robot = robot
        self._connection, self._peer, self._service, self._limit = connection, peer, service, limit
        self.spelling: Spelling = "openpi"
        self._has_instructed = False

    def receive(self) -> dict[Any, Any]:
        """The client's next map. Raises RequestError for another frame, ConnectionClosed at the end."""
        self._peer.take(0)
        self._peer.waits_since = time.monotonic()
        frame = self._connection.recv()
        self._peer.waits_since = None
        self._frame_bytes = len(frame)
        self._peer.take(self._frame_bytes)
        self.began = perf_counter()
        if self._limit is not None:
            self._limit.check(self._connection.remote_address[0])
        return unpack(frame)

    def send(self, answer: Mapping[str, Any] | str) -> None:
        """A map, or a text as it is."""
        data = answer if isinstance(answer, str) else pack(answer, self.spelling)
        self._peer.waits_since = time.monotonic()
        self._connection.send(data)

    def fail(self, reason: str) -> None:
        """OpenPI's way to say an error: a text, then the end. Its client raises the text and never comes back."""
        logger.warning("websocket robot %s: %s", self.robot, reason)
        self.send(reason)
        self._connection.close(INTERNAL_ERROR, reason.encode()[:100].decode("utf-8", "ignore"))

    def reset(self) -> None:
        """Begin an episode."""
        with self._service.enter(), self._service.robots.admit(self.robot) as robot, robot.turn:
            robot.reset()

    def decide(self, image: Any, instruction: Any, state: Any, num_steps: int) -> list[StepRecord]:
        """One decision, for so many steps. Raises RequestError and EngineError."""
        request_id = os.urandom(6).hex()
        try:
            service = self._service
            with service.enter(), service.robots.admit(self.robot) as robot, service.unpacking() as reserve:
                with service.reading(self._frame_bytes):
                    message = _build_message(image, instruction, state, reserve)
                self._has_instructed |= message.instruction is not None
                if not self._has_instructed:  # the robot's episode may have been another client's
                    raise RequestError("no instruction has come over this connection yet; say what the robot shall do")
                decoded = perf_counter()
                with robot.turn:
                    waits = {"decode": 1e3 * (decoded - self.began), "wait": 1e3 * (perf_counter() - decoded)}
                    step = robot.act(message, lambda: self._connection.state is not State.OPEN)
                    self._peer.has_acted = True
                    steps = [step, *robot.repeat(step, num_steps - 1)]
                    return [self._publish(each, robot.name, request_id, waits) for each in steps]
        except (RequestError, EngineError) as error:
            status = error.status if isinstance(error, RequestError) else HTTPStatus.SERVICE_UNAVAILABLE
            refusal = Refusal(time.time(), request_id, self.robot, "websocket", int(status), str(error))
            self._service.publish(refusal)
            raise

    def _publish(self, step: Step, robot: str, request_id: str, waits: Mapping[str, float]) -> StepRecord:
        record = build_record(step, robot, request_id, self.began, waits)
        self._service.publish(record)
        logger.info("websocket robot=%s %s", robot, " ".join(f"{key}={value!r}" for key, value in record.about.items()))
        return record


def _build_message(image: Any, instruction: Any, state: Any, reserve: Reserve) -> Message:
    text = None if instruction is None else check_text(instruction, "instruction", MAX_INSTRUCTION)
    return Message(read_picture(image, reserve), text, _read_state(state), "list")


def _read_state(state: Any) -> np.ndarray | None:
    """The state where it is surely a pose: 7 numbers, or 8 of which the seventh is 0. Others are other layouts."""
    if state is None:
        return None
    values = np.ravel(read_array(state, "state"))
    is_pose = values.dtype.kind in "iuf" and (len(values) == 7 or (len(values) == 8 and values[6] == 0))
    return check_state(values) if is_pose else None


def _find_pose(payload: Mapping[Any, Any]) -> list[float] | None:
    """The state that SimplerEnv's benchmark of vla-eval tells, as a station would: 7 numbers.

    base_pose, tcp_pose: of the arm and of the place between its finger tips, in the world: x, y, z, and a quaternion w,
    x, y, z. states: 8 numbers, the last how far the gripper is open. None where another benchmark sends other things.
    """
    names = ("base_pose", "tcp_pose", "states")
    if any(payload.get(name) is None for name in names):
        return None
    base, tips, states = told = [np.ravel(read_array(payload[name], name)) for name in names]
    if [len(each) for each in told] != [7, 7, 8] or any(each.dtype.kind not in "iuf" for each in told):
        return None
    poses = np.stack([base, tips]).astype(np.float64)
    with np.errstate(all="ignore"):  # what is not finite then is refused as any state is
        base_turn, turn = quaternion_to_matrix(poses[:, [4, 5, 6, 3]])
        place = base_turn.T @ (poses[1, :3] - poses[0, :3])
        angles = matrix_to_euler(base_turn.T @ turn @ DOWN.T)
    return [*place.tolist(), *angles.tolist(), float(states[7])]


def _take(fields: Mapping[Any, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _find_image(fields: Mapping[Any, Any]) -> Any:
    """The picture to decide on. Raises RequestError where there is none."""
    cameras = fields.get("images")
    image = _take(fields, _IMAGES)
    if image is None and isinstance(cameras, dict):
        image = _take(cameras, _CAMERAS) or _find_any(cameras, find_spelling)
    if image is None:
        image = _find_any(fields, _is_picture)
    if image is None:
        raise RequestError(f"no picture came: expected one of {', '.join(_IMAGES)} or images, got {list_names(fields)}")
    return image


def _find_any(fields: Mapping[Any, Any], is_picture: Callable[[Any], Any]) -> Any:
    """The first picture of a camera that does not move with the hand."""
    return next((value for name, value in fields.items() if "wrist" not in str(name) and is_picture(value)), None)


def _is_picture(value: Any) -> bool:
    shape = value.get("shape", value.get(b"shape")) if find_spelling(value) else None
    return isinstance(shape, list) and len(shape) == 3


def _serve_openpi(client: Client, service: Service, horizon: int) -> None:
    metadata = {name: value for name, value in service.metadata.items() if name in _TOLD}
    client.send({**metadata, "horizon": horizon, "action_dim": 7})
    _answer_openpi(client, horizon)


def _serve_roboarena(client: Client, service: Service, horizon: int) -> None:
    client.send(
        {
            "image_resolution": None,
            "needs_wrist_camera": False,
            "n_external_cameras": 1,
            "needs_stereo_camera": False,
            "needs_session_id": False,
            "action_space": "cartesian_velocity",
        }
    )
    _answer_openpi(client, horizon)


def _answer_openpi(client: Client, horizon: int) -> None:
    previous_ms = None
    try:
        client.reset()
        while True:
            fields = client.receive()
            if fields.get("endpoint") == "reset":
                client.reset()
                client.send("reset successful")
                continue
            image = _find_image(fields)
            client.spelling = find_spelling(image) or client.spelling
            records = client.decide(image, _take(fields, _PROMPTS), _take(fields, _STATES), horizon)
            infer_ms = 1e3 * (perf_counter() - client.began)
            timing = {"infer_ms": infer_ms} | ({} if previous_ms is None else {"prev_total_ms": previous_ms})
            actions = np.stack([record.decision.action for record in records])
            phrases = [record.decision.phrase for record in records]
            client.send({"actions": actions, "phrases": phrases, "server_timing": timing})
            previous_ms = 1e3 * (perf_counter() - client.began)
    except (RequestError, EngineError) as error:
        client.fail(str(error))


def _serve_vla_eval(client: Client, service: Service, horizon: int) -> None:
    client.spelling = "vla-eval"
    while True:
        fields: dict[Any, Any] = {}
        try:
            fields = client.receive()
            payload = fields.get("payload")
            if not isinstance(payload, dict):
                raise RequestError("a message is a map of type, payload (a map), seq and timestamp")
            answer = _answer_vla_eval(client, service, fields.get("type"), payload)
        except (RequestError, EngineError) as error:
            logger.warning("websocket robot %s: %s", client.robot, error)
            answer = "error", {"error": str(error)}
        if answer is not None:
            kind, payload = answer
            seq = fields.get("seq")
            client.send(
                {"type": kind, "payload": payload, "seq": seq if type(seq) is int else 0, "timestamp": time.time()}
            )


def _answer_vla_eval(
    client: Client, service: Service, kind: Any, payload: Mapping[Any, Any]
) -> tuple[str, dict[str, Any]] | None:
    """(type, payload) of the answer, None where the harness expects none: it would take any for its next action."""
    match kind:
        case "hello":
            _check_units(payload.get("benchmark"), service)
            return "hello", {
                "harness_version": f"{payload.get('harness_version', '')!s:.40}",
                "protocol_version": 1,
                "model_server": "vlm-local",
                "capabilities": {},
                "observation_params": {"send_state": True},
            }
        case "episode_start":
            client.reset()
        case "episode_end":
            pass
        case "observation":
            if payload.get("episode_restart"):
                client.reset()
            image, state = _find_image(payload), _find_pose(payload) or _take(payload, _STATES)
            (record,) = client.decide(image, _take(payload, _PROMPTS), state, 1)
            return "action", {"actions": record.decision.action.astype(np.float32), "phrase": record.decision.phrase}
        case _:
            raise RequestError(f"there is no message of type {kind!r:.40}")
    return None


def _check_units(benchmark: Any, service: Service) -> None:
    """LIBERO counts in units of its own, and its gripper closes at 1: metres would score 0 without a word.

    benchmark: the class that the harness plays, as "module:name". Raises RequestError.
    """
    if str(benchmark).startswith(_LIBERO):
        served, taken = service.metadata["action"]["units"], describe_action("libero")["units"]
        if served != taken:
            raise RequestError(f"LIBERO takes actions in {taken}, not in {served}: serve with --embodiment libero")


DIALECTS = {"/": _serve_openpi, "/roboarena": _serve_roboarena, "/vla-eval": _serve_vla_eval}
ROUTES = "/ (OpenPI), /vla-eval or /roboarena, each also below /s/ROBOT"
