"""Reasons first: what a model writes about a step of an episode, for the prompts of the steps that follow."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_local.errors import ConfigError, VLMLocalError
from vlm_local.prompts import Example, Frame, Reasoning, Template, build_prompt
from vlm_local.prompts.thoughts import MAX_TOKENS, ThoughtPlan
from vlm_local.types import GenerationRequest, Observation, Thought, ThoughtRequest

logger = logging.getLogger(__name__)

# In multiples of `every`: a thought whose picture is older is given up. At 5 Hz and every 5 steps, 10 s.
GIVE_UP_AFTER = 10

_WARM_TOKENS = 8  # of the thought before the first robot's

Think = Callable[[ThoughtRequest, Callable[[Thought], GenerationRequest]], "Future[Thought]"]


@dataclass(frozen=True)
class ThinkSettings:
    """plan: what is written. every: control steps from one beginning to the next. max_tokens: of one thought.

    between_steps: written while robots pause, and taken when it is there; else the next step waits for it.
    Raises ConfigError for any other value.
    """

    plan: ThoughtPlan
    every: int = 5
    max_tokens: int = 200
    between_steps: bool = False

    def __post_init__(self):
        if self.every < 1:
            raise ConfigError(f"--think-every must be at least 1, but is {self.every}")
        if not 1 <= self.max_tokens <= MAX_TOKENS:
            raise ConfigError(f"--think-tokens must be from 1 to {MAX_TOKENS}, but is {self.max_tokens}")

    @property
    def metadata(self) -> dict[str, Any]:
        """JSON values."""
        about = {"name": self.plan.name, "sha256": self.plan.sha256, "every": self.every, "tokens": self.max_tokens}
        return about | {"when": "between steps" if self.between_steps else "before the next step"}


@dataclass(frozen=True, eq=False)
class Seen:
    """What the prompt of a step showed, beside reasoning. episode: the engine's key."""

    observation: Observation
    history: Sequence[str]
    examples: Sequence[Example]
    frames: Sequence[Frame]
    episode: str


class Thinker:
    """One robot's reasoning in its present episode: begun every few steps, taken once it is written.

    Not thread-safe, but for the engine's thread, which asks what the next step will read.
    """

    def __init__(self, settings: ThinkSettings, think: Think, template: Template, sentences: tuple[str, ...]):
        """think: has the engine write; its second argument is called in the engine's thread. sentences: a grammar's."""
        self._settings, self._think = settings, think
        self._template, self._sentences = template, sentences
        self._running: tuple[int, Future[Thought]] | None = None
        self.clear()

    def clear(self) -> None:
        """An episode begins: what was written, and what is being written, belongs to the last one."""
        self._give_up()
        self._newest: Reasoning | None = None
        self._seen: Seen | None = None
        self._next_step = 0

    def find(self, step: int) -> Reasoning | None:
        """The newest that is written, for the prompt of `step`; waits for it where no robot does."""
        if not self._settings.between_steps:
            self._begin(is_awaited=True)
        if self._running is None:
            return self._newest
        begun, future = self._running
        if future.done() or not self._settings.between_steps:
            self._running = None
            self._take(begun, future)
        elif step - begun > GIVE_UP_AFTER * self._settings.every:
            logger.warning("a thought about step %d was not written by step %d and is given up", begun, step)
            self._give_up()
        return self._newest

    def see(self, seen: Seen) -> None:
        """A step has been answered: write about it if it is time."""
        self._seen = seen
        if self._settings.between_steps:
            self._begin(is_awaited=False)

    def describe(self, step: int, reasoning: Reasoning | None) -> dict[str, Any]:
        """For the record of a step: what its prompt showed, its age in control steps, what it cost."""
        if reasoning is None:
            return {"reasoning": None}
        thought = reasoning.thought
        about = {"step": reasoning.step, "age": step - reasoning.step, "tokens": thought.num_tokens, "ms": thought.ms}
        return {"reasoning": thought.text, **{f"reasoning_{name}": value for name, value in about.items()}}

    def _begin(self, is_awaited: bool) -> None:
        seen = self._seen
        if seen is None or self._running is not None or seen.observation.step < self._next_step:
            return
        plan, step = self._settings.plan, seen.observation.step
        template = replace(self._template, after=plan.ask)
        request = ThoughtRequest(
            seen.observation.image,
            build_prompt(template, seen.observation, seen.history, seen.examples, seen.frames),
            seen.episode,
            plan.fields,
            self._settings.max_tokens,
            is_awaited,
        )
        self._next_step = step + self._settings.every
        self._running = step, self._think(request, lambda thought: self._build_next(step, seen, thought))

    def _build_next(self, step: int, began: Seen, thought: Thought) -> GenerationRequest:
        """What the next step will read before its picture, as far as it is known now. Called in the engine's thread."""
        seen = self._seen or began
        reasoning = Reasoning(step, thought)
        prompt = build_prompt(self._template, seen.observation, seen.history, seen.examples, seen.frames, reasoning)
        return GenerationRequest(seen.observation.image, prompt, self._sentences, began.episode)

    def _take(self, step: int, future: "Future[Thought]") -> None:
        try:
            thought = future.result()
        except (VLMLocalError, CancelledError) as error:
            logger.warning("nothing was written about step %d: %s", step, error)
            return
        if thought.text:
            self._newest = Reasoning(step, thought)
        else:
            logger.warning("nothing was written about step %d: the model ended every field at once", step)

    def _give_up(self) -> None:
        if self._running is not None:
            self._running[1].cancel()
        self._running = None


def build_warm_thought(
    settings: ThinkSettings, template: Template, request: GenerationRequest
) -> tuple[ThoughtRequest, GenerationRequest]:
    """What shows how long the pieces of a thought take: a short one, and what reads one of full length.

    request: of a step, with the picture, the grammar and the episode.
    """
    observation = Observation(request.image, "warm up", np.zeros(7))
    prompt = build_prompt(replace(template, after=settings.plan.ask), observation)
    num_tokens = min(_WARM_TOKENS, settings.max_tokens)
    thought = ThoughtRequest(request.image, prompt, request.episode or "", settings.plan.fields, num_tokens)
    told = Reasoning(0, Thought(" move" * settings.max_tokens, 0))
    return thought, replace(request, prompt=build_prompt(template, observation, reasoning=told))
