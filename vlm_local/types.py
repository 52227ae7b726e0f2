"""The types that pass between the parts: frozen dataclasses with shapes, dtypes, units and frames. numpy only.

Frame: the robot's base, +x forward, +y left, +z up; metres and radians. Images: uint8 RGB.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

AXES = ("x", "y", "z", "tilt", "yaw", "gripper")


class Primitive(NamedTuple):
    """A movement of Embodied-Chain-of-Thought as signs: -1, 0 or +1 an axis, in the order of AXES.

    Positive: forward, left, up, tilt up, counterclockwise, open.
    """

    x: int = 0
    y: int = 0
    z: int = 0
    tilt: int = 0
    yaw: int = 0
    gripper: int = 0


@dataclass(frozen=True, eq=False)
class Observation:
    """What the robot sees and feels at one control step.

    image: uint8 (H, W, 3) RGB.
    instruction: the user's words, never empty.
    proprio: float64 (7,) [x, y, z (m), roll, pitch, yaw (rad), gripper opening 0 closed..1 open] in
        the base frame, or None where the robot did not say. Wire and files convert to this layout.
    step: number of this control step in its episode, from 0. The episode counts; policies do not.
    gripper: the command that the gripper is under, 0 closed..1 open, where the caller knows what was sent
        to the robot. None: the policy's own last command counts.
    unmarked: the picture as it came, where `image` was drawn into; None where it was not.
    """

    image: np.ndarray
    instruction: str
    proprio: np.ndarray | None = None
    step: int = 0
    gripper: float | None = None
    unmarked: np.ndarray | None = None

    @property
    def opening(self) -> float | None:
        """The gripper's measured opening, 0 closed..1 open; None without proprio."""
        return None if self.proprio is None else float(self.proprio[6])


@dataclass(frozen=True, eq=False)
class Decision:
    """A policy's answer to one observation.

    action: float64 (7,) [dx, dy, dz (m), droll, dpitch, dyaw (rad), gripper 1 open 0 closed] per
        control step, base frame; always finite.
    phrase: the movement phrase, or None for a foreign policy that knows none.
    probability: of the phrase, renormalised under the grammar; None where it was not computed.
    margin: probability minus that of the second-best phrase.
    marginals: axis name -> (p(-1), p(0), p(+1)); lower bounds that miss `missing_mass` in sum.
    probabilities: of every phrase of the grammar, where the posterior is "exact"; None otherwise.
    timings_ms: stage -> milliseconds.
    fault: why this is a stand-still instead of an answer, or None.
    extra: what a wrapper or engine adds to the record (JSON values only).
    """

    action: np.ndarray
    phrase: str | None = None
    probability: float | None = None
    margin: float | None = None
    marginals: Mapping[str, tuple[float, float, float]] | None = None
    missing_mass: float | None = None
    probabilities: Mapping[str, float] | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    fault: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that a prompt shows before the present one: the same object at every step, so that it is hashed once.

    pixels: uint8 (H, W, 3) RGB.
    """

    pixels: np.ndarray

    @cached_property
    def key(self) -> int:
        """A hash of shape and pixels, at least 1 and below 2**62. KV is kept as long as it is the same."""
        digest = hashlib.blake2b(repr(self.pixels.shape).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.pixels).data)
        return 1 + (int.from_bytes(digest.digest(), "little") >> 2)


@dataclass(frozen=True)
class Prompt:
    """What the model reads around the present picture: a sequence of texts and pictures.

    before: stays constant in an episode, so its KV can be reused. after: may change at every step. Both are plain
        text in the model's own style (chat content, or PaliGemma's prefix).
    earlier: texts and pictures between `before` and the present picture: examples, past frames.
    """

    before: str
    after: str
    earlier: tuple[str | Picture, ...] = ()

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Those of `earlier`."""
        return tuple(part for part in self.earlier if isinstance(part, Picture))

    def list_parts(self) -> list[str | Picture | None]:
        """Everything in reading order, None for the present picture. A newline parts a text from its neighbours."""
        parts: list[str | Picture | None] = []
        for part in (self.before, *self.earlier):
            if isinstance(part, Picture):
                parts.append(part)
            elif part:
                follows_picture = bool(parts) and isinstance(parts[-1], Picture)
                parts.append(f"\n{part}\n" if follows_picture else f"{part}\n")
        return [*parts, None, f"\n{self.after}"]


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One request to an engine: answer with exactly one of `sentences` about `image`.

    image: the present picture; the prompt carries those before it.
    sentences: the grammar's sentences in file order (the order sampling draws in); tuples are
        hashable and engines cache what they build from them.
    episode: key of the robot's current episode; KV and drafts are shared under the same key only.
        None shares nothing and is no robot's: a question, or a try.
    drafts: sentences that are likely, likeliest first (the last answers of this episode). They make an answer
        faster and never change it, but in 16 bits where two tokens are a near tie.
    decide: "greedy" token by token, "map" the most probable sentence, "sample" by `uniform`.
    temperature: divides the restricted logits of every token when sampling.
    uniform: in [0, 1); the sentence at which the CDF over `sentences` passes it is the sample.
    posterior: "off", "fast" (most of the mass, certified bound on the rest) or "exact".
    contrast: alpha; every decision and probability means log p(token | node) - alpha log p0(token | node), renormalised
        over the tokens that may follow; p0 is what the model says to a blank picture. 0 reads no blank picture.
    blank: what p0 is asked, the same words with nothing measured and nothing said before; needed above alpha 0.
    wants_features: the answer has the model's features of `image`, too.
    """

    image: np.ndarray
    prompt: Prompt
    sentences: tuple[str, ...]
    episode: str | None = None
    drafts: tuple[str, ...] = ()
    decide: str = "greedy"
    temperature: float = 1.0
    uniform: float | None = None
    posterior: str = "off"
    contrast: float = 0.0
    blank: Prompt | None = None
    wants_features: bool = False


@dataclass(frozen=True, eq=False)
class Generation:
    """An engine's answer: one of the request's sentences, with the probabilities of all as far as they are known.

    sentence: one of the request's sentences; EngineWorker refuses any other.
    probabilities: float64 (len(sentences),) lower bounds at temperature 1 in the request's order,
        or None where the engine gives none.
    missing_mass: 1 - probabilities.sum(): probability that is not assigned to any sentence yet.
    timings_ms: stage -> milliseconds; "engine" is the total.
    stats: counters for benchmarks and metrics (forwards, draft_hit, near_tie ...).
    features: float32 (n,), the mean of the present picture's image features, where the request wants them.
    """

    sentence: str
    probabilities: np.ndarray | None = None
    missing_mass: float | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    features: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class ThoughtRequest:
    """A request to write named fields about what is seen, in free text, between two steps of a robot.

    image, episode: as in GenerationRequest. prompt: asks for the fields.
    fields: (name, most tokens of its text) in order. max_tokens: of all texts together; what they do not reach to is
        not written.
    is_awaited: a caller that no robot waits for stands still until it is written: the robots' pauses do not count.
    """

    image: np.ndarray
    prompt: Prompt
    episode: str
    fields: tuple[tuple[str, int], ...]
    max_tokens: int
    is_awaited: bool = False


@dataclass(frozen=True)
class Thought:
    """What an engine wrote. It is the model's own words: untrusted.

    text: a line "NAME: words" for each field that has any, in order; without control characters. num_tokens: that
    were written, the ends of fields included. ms: that the engine spent on it.
    """

    text: str
    num_tokens: int
    ms: float = 0.0


@dataclass(frozen=True, eq=False)
class Episode:
    """A recorded episode: states and actions eager, frames lazy.

    index: 0-based reading order (ids in data sets are not unique).
    instruction: the first, "" where the recording has none.
    states: float32 (T, 7) [x, y, z (m), roll, pitch, yaw (rad), gripper 0 closed..1 open], rotations measured from the
        gripper pointing down.
    actions: float32 (T, 7) as Decision.action, or None where the recording has none.
    load_image: step -> uint8 (H, W, 3) RGB; raises DataError for a frame that cannot be read.
    source: file and record, for messages.
    step_instructions: one for each step, "" where it has none; None where `instruction` is that of all steps.
    success: what the recording says of its end, None where it says nothing.
    """

    index: int
    instruction: str
    states: np.ndarray
    actions: np.ndarray | None
    load_image: Callable[[int], np.ndarray]
    source: str
    step_instructions: tuple[str, ...] | None = None
    success: bool | None = None

    def __len__(self) -> int:
        return len(self.states)

    def instruction_at(self, step: int) -> str:
        """The instruction of step `step`, "" where the recording has none."""
        return self.instruction if self.step_instructions is None else self.step_instructions[step]
