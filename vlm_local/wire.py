"""Request bytes <-> types, exactly as the robots' clients speak. No HTTP, no global patching of json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pybase64

from vlm_local.bounds import check_json
from vlm_local.errors import RequestError
from vlm_local.fields import MAX_SIDE, Reserve, check_text, decode_image, decode_state, show, take_any
from vlm_local.primitives import parse_phrase
from vlm_local.types import Decision

# The largest image in json_numpy's base64, and a margin for everything else.
MAX_BODY = 4 * (MAX_SIDE * MAX_SIDE * 3) // 3 + 2**20
MAX_INSTRUCTION = 2000

_MAX_NAMED = 5  # fields that an error lists


@dataclass(frozen=True, eq=False)
class Message:
    """A decoded /act request.

    image: uint8 (H, W, 3) RGB. instruction: None keeps the episode's. state: float64 (7,) or (8,), the field
    "proprio" as it was sent: what its numbers mean depends on the robot (embodiments/frame.py); None where none came.
    form: how the client wants its answer, "json_numpy", "encoded" or "list".
    """

    image: np.ndarray
    instruction: str | None
    state: np.ndarray | None
    form: str


def decode_act(body: bytes, reserve: Reserve = take_any) -> Message:
    """The body of /act -> Message. Raises RequestError with a sentence for everything else."""
    fields, form = load_request(body)
    check_names(fields, ("image", "instruction"), ("proprio",))
    image, instruction, state = fields["image"], fields["instruction"], fields.get("proprio")
    if form == "list" and any(isinstance(value, dict) and "__numpy__" in value for value in (image, state)):
        form = "json_numpy"
    return Message(decode_image(image, reserve), _decode_instruction(instruction), decode_state(state), form)


def is_submission_test(message: Message) -> bool:
    """Whether AutoEval's form asks if the address typed into it answers: a black picture, zeros and these words."""
    is_empty = not message.image.any() and (message.state is None or not message.state.any())
    return message.instruction == "test connection" and is_empty


def decode_reset(body: bytes) -> int | None:
    """The body of /reset, empty or `{"seed": int}` -> the seed, None where none is given."""
    if not body.strip():
        return None
    value = _load_json(body)
    fields = {} if value is None else _as_object(value)
    check_names(fields, (), ("seed",))
    seed = fields.get("seed")
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise RequestError(f"seed: expected a whole number from 0 to 2**64 - 1, got {show(seed)}")
    return seed


def encode_action(action: np.ndarray, form: str) -> bytes:
    """float64 (7,) -> the body of an answer in the form its client reads."""
    if form == "list":
        return json.dumps(action.tolist()).encode()
    text = json.dumps(encode_array(action))
    return (text if form == "json_numpy" else json.dumps(text)).encode()


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """An array as json_numpy writes it."""
    data = pybase64.b64encode_as_string(np.ascontiguousarray(array).data)
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def build_details(decision: Decision, **where: Any) -> dict[str, Any]:
    """The object of `/act?details=1`, also a line of steps.jsonl. where: model, robot, episode, step, and what else
    the caller knows of the step.
    """
    axes = None if decision.phrase is None else parse_phrase(decision.phrase)._asdict()
    marginals = decision.marginals
    return {
        "action": decision.action.tolist(),
        "phrase": decision.phrase,
        "axes": axes,
        "probability": decision.probability,
        "margin": decision.margin,
        "marginals": None if marginals is None else {axis: list(values) for axis, values in marginals.items()},
        "missing_mass": decision.missing_mass,
        "timings_ms": {stage: round(value, 3) for stage, value in decision.timings_ms.items()},
        **where,
        "fault": decision.fault,
        "extra": dict(decision.extra),
    }


def _load_json(body: bytes) -> Any:
    check_json(body)
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        raise RequestError(f"the body looks like text in {encoding.upper()}; send JSON in UTF-8")
    try:
        return json.loads(body.decode(encoding), object_pairs_hook=_build_object)
    except UnicodeDecodeError as error:
        came = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise RequestError(f"the body is not UTF-8 text: {came}; send JSON, a picture in it as base64") from None
    except RecursionError:
        raise RequestError("the body is JSON nested too deeply to be a request") from None
    except ValueError as error:
        raise RequestError(f"the body is not complete JSON: {error}") from None


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = {}
    for name, value in pairs:
        if name in fields:
            raise RequestError(f"the field {show(name)} comes twice in one object; send it once")
        fields[name] = value
    return fields


def _as_object(value: Any) -> dict:
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, but is {show(value)}")
    return value


def check_names(fields: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises RequestError for a missing field, and for one in another case: `Proprio` would be missed in silence.

    Fields of other names are allowed: clients of other servers send more.
    """
    known = (*needed, *optional)
    for name in fields:
        if name not in known and name.lower() in known:
            raise RequestError(f"the field {show(name)} must be written {name.lower()!r}")
    for name in needed:
        if name not in fields:
            came = ", ".join(show(name) for name in list(fields)[:_MAX_NAMED]) or "nothing"
            raise RequestError(f"the field {name!r} is missing; a request is {{{', '.join(known)}}}, but {came} came")


def load_request(body: bytes) -> tuple[dict, str]:
    """A request's fields and the form of its answer. Raises RequestError.

    They may stand in an envelope `{"encoded": text}`, sent where json_numpy could not be installed on both sides.
    """
    fields = _load_object(body)
    if set(fields) != {"encoded"}:
        return fields, "list"
    text = fields["encoded"]
    if not isinstance(text, str):
        raise RequestError(f"encoded: expected the request as JSON text in a string, got {show(text)}")
    return _load_object(text.encode("utf-8", "surrogatepass")), "encoded"


def _load_object(body: bytes) -> dict:
    if not body:
        raise RequestError("the body is empty; send a JSON object with 'image', 'instruction' and 'proprio'")
    return _as_object(_load_json(body))


def _decode_instruction(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and not value.strip():
        raise RequestError("instruction: it is empty; say what the robot shall do, or send null to keep the last one")
    return check_text(value, "instruction", MAX_INSTRUCTION)
