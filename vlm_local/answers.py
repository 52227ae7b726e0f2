"""A question about a picture -> exactly one of the given choices, and how probable each of them is."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_local.client import Detector, PolicyError
from vlm_local.errors import EngineError, RequestError
from vlm_local.fields import check_text, decode_image
from vlm_local.prompts import Template, build_prompt
from vlm_local.remote_policy import read_number, read_timings
from vlm_local.types import Generation, GenerationRequest, Observation, Prompt
from vlm_local.wire import check_names, load_request

MIN_CHOICES, MAX_CHOICES = 2, 64
MAX_CHOICE = 200
MAX_QUESTION = 2000


@dataclass(frozen=True, eq=False)
class Question:
    """A typed question. image: uint8 (H, W, 3) RGB. choices: the only possible answers, word for word."""

    image: np.ndarray
    text: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """The answer to a Question.

    choice: one of the question's choices. probabilities: of every choice, None where the engine gives none.
    missing_mass: probability that the engine could not assign to a choice; 0 when all is known.
    """

    choice: str
    probabilities: Mapping[str, float] | None
    missing_mass: float | None
    timings_ms: Mapping[str, float]

    @property
    def probability(self) -> float | None:
        return None if self.probabilities is None else self.probabilities[self.choice]


class Answerer:
    """Asks an engine typed questions. Thread-safe if `generate` is."""

    def __init__(self, generate: Callable[[GenerationRequest], Generation], template: Template):
        """template: shows the question where a robot's prompt shows the instruction."""
        self._generate = generate
        self._template = template

    def answer(self, question: Question) -> Answer:
        """The most probable choice; the greedy one where the engine's probabilities do not settle it."""
        text = complete_question(question.text, question.choices)
        prompt = build_prompt(self._template, Observation(question.image, text))
        return self.choose(question.image, prompt, question.choices)

    def choose(self, image: np.ndarray, prompt: Prompt, choices: tuple[str, ...]) -> Answer:
        """As `answer`, with a prompt that holds question and choices already. image: as in Question."""
        generation = self._generate(GenerationRequest(image, prompt, choices, posterior="exact"))
        told = generation.probabilities
        if told is None:
            return Answer(generation.sentence, None, None, generation.timings_ms)
        said = choices.index(generation.sentence)
        best = int(told.argmax())
        choice = choices[best if told[best] > told[said] + generation.missing_mass else said]
        probabilities = dict(zip(choices, map(float, told), strict=True))
        return Answer(choice, probabilities, generation.missing_mass, generation.timings_ms)


def ask_server(detector: Detector, question: Question) -> Answer:
    """As Answerer.answer, by a running server. Raises EngineError or RequestError, as an engine would."""
    try:
        detector(complete_question(question.text, question.choices), question.image)
    except PolicyError as error:
        if error.status is not None and 400 <= error.status < 500:
            raise RequestError(str(error), error.status) from None
        raise EngineError(str(error)) from None
    told = detector.last or {}
    probabilities = _read_probabilities(told.get("probabilities"), question.choices)
    missing = read_number(told.get("missing_mass"), 0)
    return Answer(told["answer"], probabilities, missing, read_timings(told.get("timings_ms")))


def _read_probabilities(value: Any, choices: Sequence[str]) -> dict[str, float] | None:
    """One for each choice, or none at all."""
    told = value if isinstance(value, dict) else {}
    read = {choice: read_number(told.get(choice), 0) for choice in choices}
    known = {choice: value for choice, value in read.items() if value is not None}
    return known if len(known) == len(read) else None


def complete_question(text: str, choices: Sequence[str]) -> str:
    """The question as AutoEval words it, "... answer yes or no", unless it ends in its choices, in any order."""
    ending = "answer " + " or ".join(choices)
    plain = text.strip()
    _, mark, tail = plain.lower().rstrip(".").rpartition("answer ")
    is_complete = mark and sorted(tail.split(" or ")) == sorted(choice.lower() for choice in choices)
    return plain if is_complete or plain.lower().rstrip(".").endswith(ending.lower()) else f"{plain} {ending}"


def decode_question(body: bytes) -> Question:
    """The body of /answer -> Question. Raises RequestError with a sentence for everything else."""
    fields, _ = load_request(body)
    check_names(fields, ("image", "question", "choices"))
    text = check_text(fields["question"], "question", MAX_QUESTION)
    return Question(decode_image(fields["image"]), text, check_choices(fields["choices"]))


def check_choices(value: Any) -> tuple[str, ...]:
    """Choices that can be told apart, as sent and as read. Raises RequestError."""
    if not isinstance(value, list) or not MIN_CHOICES <= len(value) <= MAX_CHOICES:
        came = f"{len(value)}" if isinstance(value, list) else type(value).__name__
        raise RequestError(f"choices: expected a list of {MIN_CHOICES} to {MAX_CHOICES} strings, got {came}")
    seen: dict[str, str] = {}
    for choice in value:
        check_text(choice, "choices", MAX_CHOICE)
        if choice != choice.strip() or not choice.isprintable():
            raise RequestError(f"choices: {choice!r} begins or ends with a space, or holds a control character")
        read = "".join(unicodedata.normalize("NFKC", choice).casefold().split())
        if read in seen:
            raise RequestError(
                f"choices: {seen[read]!r} and {choice!r} differ at most in case or spaces; make them distinct"
            )
        seen[read] = choice
    return tuple(value)


def build_answer_details(answer: Answer, model: str | None) -> dict[str, Any]:
    """The object that /answer sends."""
    return {
        "answer": answer.choice,
        "probability": answer.probability,
        "probabilities": answer.probabilities,
        "missing_mass": answer.missing_mass,
        "timings_ms": {stage: round(value, 3) for stage, value in answer.timings_ms.items()},
        "model": model,
    }
