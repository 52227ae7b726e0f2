"""A policy that another server answers. All that it says is checked before it counts."""

import re
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from vlm_local.client import PolicyClient, PolicyError
from vlm_local.errors import EngineError, RequestError
from vlm_local.plain import hide_secrets
from vlm_local.primitives import list_phrases, list_slight_phrases
from vlm_local.safety import COLUMNS
from vlm_local.types import AXES, Decision, Observation

_ROUNDED = 1e-6  # how far a rounded probability may be outside of 0..1
_MAX_ENTRIES = 32  # of timings, and of what wrappers and engines add
_MAX_TEXT = 300
_MAX_REASONING = 4000  # characters: twice the longest thought, in most languages
_LARGEST = 1e300
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")  # stages stand in a header, names of extras in metrics
_PHRASES = frozenset(list_phrases() + list_slight_phrases())
# A refusal of what the robot sent. All others (token, path, load) are between this client and the server.
_OBSERVATION_REFUSED = (400, 413, 422)

Answer = TypeVar("Answer")


class RemotePolicy:
    """A Policy (see vlm_local.policy) that a server answers. One per robot and episode at a time."""

    def __init__(self, url: str, timeout_s: float = 30.0):
        """url, timeout_s: as PolicyClient takes them."""
        self._client = PolicyClient(url, timeout_s)
        self._next: int | None = None  # step that our own server will count next, None where that is not known

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {"url": self._client.url, **_clean_metadata(_ask(lambda: self._client.metadata))}

    def reset(self, seed: int) -> None:
        _ask(lambda: self._client.reset(seed))
        self._next = 0

    def act(self, observation: Observation) -> Decision:
        """Raises EngineError where the server failed, RequestError where it refused the observation."""
        start = perf_counter()
        expected, self._next = self._next, None
        answer = _ask(lambda: self._client.act(observation.image, observation.instruction, observation.proprio))
        self._next = self._check_step(answer.get("step"), expected)
        return _read_decision(_find_meant(answer), answer, 1e3 * (perf_counter() - start))

    def _check_step(self, step: Any, expected: int | None) -> int | None:
        """The step after this one. Raises EngineError where a second client drives the same robot of the server.

        The server may begin an episode by itself, at step 0. Any other gap is an answer that somebody else got.
        """
        if not isinstance(step, int):
            return expected
        if expected is not None and step not in (0, expected):
            raise EngineError(
                f"another client drives {hide_secrets(self._client.url)} too: step {step} came instead of {expected}; "
                "give each a URL with a name of its own, http://HOST:PORT/s/NAME"
            )
        return step + 1

    def close(self) -> None:
        self._client.close()


def _find_meant(answer: Mapping[str, Any]) -> np.ndarray:
    """The action in metres and radians, 1 = open: `action` itself may be in the units of the server's embodiment."""
    meant = answer.get("meant")
    if answer.get("frame") != "bridge" or not isinstance(meant, list):
        return answer["action"]
    is_action = len(meant) == len(answer["action"]) and all(map(_is_number, meant))
    return np.array(meant, np.float64) if is_action else answer["action"]


def _ask(question: Callable[[], Answer]) -> Answer:
    try:
        return question()
    except PolicyError as error:
        if error.status in _OBSERVATION_REFUSED:
            raise RequestError(str(error), error.status) from None
        raise EngineError(str(error)) from None


def _read_decision(action: np.ndarray, details: Mapping[str, Any], http_ms: float) -> Decision:
    """action: float64 (7,), finite. details: as wire.build_details writes them, all of them optional.

    Optional values that cannot be read are left out. A phrase that is none of ours is, too, as if
    the policy knew no phrases; `extra` keeps what it said.
    """
    phrase, extra = details.get("phrase"), _read_extra(details.get("extra"))
    if phrase is not None and not (isinstance(phrase, str) and phrase in _PHRASES):
        phrase, extra = None, {**extra, "unknown_phrase": _show(phrase)}
    fault = details.get("fault")
    return Decision(
        action,
        phrase,
        probability=read_number(details.get("probability"), 0),
        margin=read_number(details.get("margin"), -1),
        marginals=_read_marginals(details.get("marginals")),
        missing_mass=read_number(details.get("missing_mass"), 0),
        timings_ms={**read_timings(details.get("timings_ms")), "http": http_ms},
        fault=None if not fault else fault[:_MAX_TEXT] if isinstance(fault, str) else _show(fault),
        extra=extra,
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def read_number(value: Any, low: float, high: float = 1.0) -> float | None:
    """A number in low..high, None for anything else."""
    in_range = _is_number(value) and low - _ROUNDED <= value <= high + _ROUNDED
    return float(value) if in_range else None


def _is_number(value: Any) -> bool:
    """Whether it is a finite number; JSON has whole ones that no float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _read_marginals(value: Any) -> dict[str, tuple[float, float, float]] | None:
    if not isinstance(value, dict) or set(value) != set(AXES):
        return None
    read: dict[str, tuple[float, float, float]] = {}
    for axis in AXES:
        told = value[axis] if isinstance(value[axis], list) else []
        shares = [share for each in told if (share := read_number(each, 0)) is not None]
        if len(told) != 3 or len(shares) != 3:
            return None
        read[axis] = shares[0], shares[1], shares[2]
    return read


def read_timings(value: Any) -> dict[str, float]:
    """Stage -> milliseconds, as far as it can be read."""
    found = {name: read_number(ms, 0, _LARGEST) for name, ms in _list_entries(value)}
    return {name: ms for name, ms in found.items() if ms is not None}


def _read_extra(value: Any) -> dict[str, Any]:
    """Plain values and short lists of them. `cut` is counted by its names, so it holds nothing but joints."""
    found = {name: entry for name, entry in _list_entries(value) if _is_plain(entry) or _is_plain_list(entry)}
    if isinstance(value, dict) and isinstance(value.get("reasoning"), str):
        found["reasoning"] = value["reasoning"][:_MAX_REASONING]
    if not isinstance(found.get("cut", []), list) or not all(name in COLUMNS for name in found.get("cut", [])):
        del found["cut"]
    return found


def _list_entries(value: Any) -> list[tuple[str, Any]]:
    entries = list(value.items())[:_MAX_ENTRIES] if isinstance(value, dict) else []
    return [(name, entry) for name, entry in entries if _NAME.fullmatch(name)]


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_ENTRIES and all(map(_is_plain, value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    return value is None or isinstance(value, bool) or _is_number(value)


def _clean_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a server says of itself, without what is no JSON (NaN, infinity). `model` is a text or missing."""
    found = {name: _clean(entry) for name, entry in metadata.items()}
    if not isinstance(found.get("model"), str):
        found.pop("model", None)
    return found


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clean(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return list(map(_clean, value))
    return value if not isinstance(value, float) or _is_number(value) else None
