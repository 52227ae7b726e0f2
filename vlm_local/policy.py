"""Policies: `reset` and `act`. VLMPolicy asks an engine; HoldPhrase wraps any policy. Knows no HTTP and no torch."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from vlm_local.actions import GripperLatch, StepTable, build_action
from vlm_local.context import PromptContext
from vlm_local.errors import ConfigError
from vlm_local.grammar import Grammar
from vlm_local.primitives import parse_phrase
from vlm_local.prompts import Example, Frame, Reasoning, Template, build_prompt
from vlm_local.thinking import Seen, Thinker
from vlm_local.types import AXES, Decision, Generation, GenerationRequest, Observation, Prompt

DECIDE = ("greedy", "map", "sample")
POSTERIOR = ("off", "fast", "exact")
_NUM_DRAFTS = 8  # last phrases that an engine may draft from; older ones weigh 1/256 of the last one
_NUM_TOLD = 5  # likeliest phrases in an answer that no robot waits for


class Policy(Protocol):
    """One robot's policy. Not thread-safe: one observation at a time, in order.

    The caller counts the steps of an episode and says the number in each observation.
    """

    def reset(self, seed: int) -> None:
        """Start an episode; `seed` (0 <= seed < 2**64) fixes every draw in it."""

    def act(self, observation: Observation) -> Decision:
        """Answer one observation. Raises EngineError where the model's side failed."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What it is, for records and reports: JSON values only."""
        ...


@dataclass(frozen=True)
class Settings:
    """How a phrase is chosen.

    decide: one of DECIDE. temperature: divides the logits when sampling. posterior: one of POSTERIOR, see
    types.GenerationRequest. history: how many of the episode's last phrases the prompt shows. contrast: how much of
    what the model says to a blank picture is taken out, 0 for nothing.

    Raises ConfigError for any other value.
    """

    decide: str = "greedy"
    temperature: float = 1.0
    history: int = 0
    posterior: str = "off"
    contrast: float = 0.0

    def __post_init__(self):
        if self.decide not in DECIDE:
            raise ConfigError(f"decide must be one of {', '.join(DECIDE)}, not {self.decide!r}")
        if self.posterior not in POSTERIOR:
            raise ConfigError(f"posterior must be one of {', '.join(POSTERIOR)}, not {self.posterior!r}")
        if not 0 < self.temperature <= sys.float_info.max:
            raise ConfigError(f"temperature must be a positive number, not {self.temperature}")
        if self.history < 0:
            raise ConfigError(f"history must not be negative, but is {self.history}")
        if not 0 <= self.contrast <= sys.float_info.max:
            raise ConfigError(f"contrast must be 0 or a positive number, not {self.contrast}")


def derive_seed(seed: int, robot: str, episode: int) -> int:
    """The seed of an episode that was given none: a hash of the server's seed, robot and number."""
    digest = hashlib.sha256(f"{seed}/{robot}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def draw_uniform(seed: int, step: int) -> float:
    """The number in [0, 1) that decides step `step` of an episode: the same on every machine."""
    return float(np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64))).random())


def draw_phrase(phrases: Sequence[str], seed: int, step: int) -> str:
    """One of them, each alike, by the number of `draw_uniform`."""
    return phrases[int(draw_uniform(seed, step) * len(phrases))]


class VLMPolicy:
    """Asks a VLM for a movement phrase and turns it into an action.

    prompt -> engine under the grammar -> parse -> step table -> gripper latch. Not thread-safe: one per robot.
    """

    def __init__(
        self,
        generate: Callable[[GenerationRequest], Generation],
        grammar: Grammar,
        template: Template,
        settings: Settings = Settings(),
        table: StepTable = StepTable(),
        robot: str | None = "robot",
        forget: Callable[[str], None] = lambda episode: None,
        metadata: Mapping[str, Any] | None = None,
        context: PromptContext | None = None,
        thinker: Thinker | None = None,
    ):
        """generate: blocks until the engine has answered. forget: has the engine drop what it keeps of an episode.

        grammar: of movement phrases. robot: its name, part of the key under which the engine keeps an episode's KV;
        None where no robot waits for the answers: nothing is kept between them, and robots go first.
        metadata: what the policy says of itself. context: this robot's examples and past frames, None where the prompt
        shows neither. thinker: its reasoning; without a robot there is none.
        """
        self._generate = generate
        self._forget = forget
        self._grammar = grammar
        self._places = {sentence: place for place, sentence in enumerate(grammar.sentences)}
        self._primitives = [parse_phrase(sentence) for sentence in grammar.sentences]
        self._signs = np.array(self._primitives)  # (S, 6)
        self._template = template
        self._settings = settings
        self._table = table
        self._robot = robot
        self._metadata = dict(metadata or {})
        self._context = context or PromptContext()
        self._thinker = None if robot is None else thinker
        self._latch = GripperLatch()
        self._episode = 0
        self.reset(derive_seed(0, robot or "", 0))

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    def reset(self, seed: int) -> None:
        if self._key is not None:
            self._forget(self._key)
        self._episode += 1
        self._seed = seed
        self._phrases: list[str] = []
        self._context.clear()
        if self._thinker is not None:
            self._thinker.clear()
        self._latch.reset()

    @property
    def _key(self) -> str | None:
        return None if self._robot is None else f"{self._robot}/{self._episode}"

    def act(self, observation: Observation) -> Decision:
        """Raises EngineError where the engine failed or took too long, RequestError for what it cannot be asked."""
        reasoning = None if self._thinker is None else self._thinker.find(observation.step)
        start = perf_counter()
        examples, frames = self._context.look(observation, self._generate, self._key)
        history = self._phrases[-self._settings.history :] if self._settings.history else []
        request = self._build_request(observation, history, examples, frames, reasoning)
        prompted = perf_counter()
        generation = self._generate(request)
        phrase, place = generation.sentence, self._places[generation.sentence]  # the worker refuses any other
        primitive = self._primitives[place]
        self._phrases.append(phrase)
        command = self._latch.update(primitive.gripper, observation.opening, observation.gripper)
        action = build_action(primitive, command, self._table.choose(phrase))
        timings = {"prompt": 1e3 * (prompted - start), **generation.timings_ms}
        timings["policy"] = 1e3 * (perf_counter() - start)
        about = self._describe_choice(generation, place) | self._context.describe(examples, frames)
        if self._thinker is not None and self._key is not None:
            about |= self._thinker.describe(observation.step, reasoning)
            self._thinker.see(Seen(observation, history, examples, frames, self._key))
        extra = {**generation.stats, **about}
        return Decision(action, phrase, timings_ms=timings, extra=extra, **self._summarise(generation, place))

    def _build_request(
        self,
        observation: Observation,
        history: Sequence[str],
        examples: Sequence[Example],
        frames: Sequence[Frame],
        reasoning: Reasoning | None,
    ) -> GenerationRequest:
        settings = self._settings
        return GenerationRequest(
            image=observation.image,
            prompt=build_prompt(self._template, observation, history, examples, frames, reasoning),
            sentences=self._grammar.sentences,
            episode=self._key,
            drafts=tuple(dict.fromkeys(reversed(self._phrases[-_NUM_DRAFTS:]))),
            decide=settings.decide,
            temperature=settings.temperature,
            uniform=draw_uniform(self._seed, observation.step) if settings.decide == "sample" else None,
            posterior=settings.posterior,
            contrast=settings.contrast,
            blank=self._build_blank(observation) if settings.contrast else None,
        )

    def _build_blank(self, observation: Observation) -> Prompt:
        """The words alone: state and history change at every step, and p0 shall be read once an instruction."""
        return build_prompt(self._template, Observation(observation.image, observation.instruction))

    def _describe_choice(self, generation: Generation, place: int) -> dict[str, Any]:
        """place: of the answer in the grammar. Returns "sampled": True where it was drawn, and "likeliest": (phrase,
        probability) of the likeliest phrases.

        A robot is told one, and only where that is not the answer; whoever asks without a robot is told _NUM_TOLD.
        """
        about: dict[str, Any] = {"sampled": True} if self._settings.decide == "sample" else {}
        probabilities = generation.probabilities
        if probabilities is None:
            return about
        sentences = self._grammar.sentences
        order = np.argsort(-probabilities, kind="stable")[: 1 if self._robot else _NUM_TOLD]
        told = [(sentences[at], float(probabilities[at])) for at in order if probabilities[at] > 0]
        most = probabilities[place] + (generation.missing_mass or 0.0)  # that the answer can have
        if self._robot is None or (told and told[0][1] > most):
            about["likeliest"] = told
        return about

    def _summarise(self, generation: Generation, place: int) -> dict[str, Any]:
        """Probabilities over sentences (S,) -> the fields of Decision about them."""
        probabilities = generation.probabilities
        if probabilities is None:
            return {}
        others = np.delete(probabilities, place)
        named = None
        if self._settings.posterior == "exact":
            named = dict(zip(self._grammar.sentences, probabilities.tolist(), strict=True))
        marginals = {
            axis: tuple(float(probabilities[self._signs[:, column] == sign].sum()) for sign in (-1, 0, 1))
            for column, axis in enumerate(AXES)
        }
        return {
            "probability": float(probabilities[place]),
            "margin": float(probabilities[place] - others.max(initial=0.0)),
            "marginals": marginals,
            "missing_mass": generation.missing_mass,
            "probabilities": named,
        }


class HoldPhrase:
    """Repeats every decision of the inner policy for `steps` control steps, because a phrase of ECoT describes three.

    `extra["held"]` counts the steps since the decision was made. Where steps are missing in between (something else
    answered them), the inner policy is asked again.
    """

    def __init__(self, policy: Policy, steps: int):
        self._policy = policy
        self._steps = steps
        self._decision: Decision | None = None
        self._age = 0
        self._last_step = -1

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {**self._policy.metadata, "steps_per_phrase": self._steps}

    def reset(self, seed: int) -> None:
        self._decision = None
        self._policy.reset(seed)

    def act(self, observation: Observation) -> Decision:
        follows = observation.step == self._last_step + 1
        self._last_step = observation.step
        if self._decision is not None and follows and self._age + 1 < self._steps:
            self._age += 1
            return replace(self._decision, timings_ms={}, extra={**self._decision.extra, "held": self._age})
        self._decision, self._age = None, 0  # a fault leaves nothing to answer from
        self._decision = self._policy.act(observation)
        return self._decision
