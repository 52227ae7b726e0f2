"""Engines without a model: any distribution over the sentences. For baselines and tests."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_local.types import Generation, GenerationRequest


class ScriptedEngine:
    """Draws from, or takes the best of, what `weigh` says of a request.

    weigh: request -> float (S,) non-negative weights of its sentences, not all zero. The decision
    follows the request (`sample` draws by its `uniform`); `temperature` is ignored.
    """

    max_batch = 64

    def __init__(self, weigh: Callable[[GenerationRequest], np.ndarray], name: str):
        self._weigh = weigh
        self._name = name

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {"model": self._name, "engine": "scripted", "trained": None}

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        return [self._answer(request) for request in requests]

    def forget(self, episode: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""

    def _answer(self, request: GenerationRequest) -> Generation:
        weights = np.asarray(self._weigh(request), dtype=np.float64)
        probabilities = weights / weights.sum()
        if request.decide == "sample":
            cumulative = probabilities.cumsum()
            index = int(np.searchsorted(cumulative, request.uniform * cumulative[-1], side="right"))
        else:
            index = int(probabilities.argmax())
        return Generation(request.sentences[index], probabilities, missing_mass=0.0)


def build_uniform_engine() -> ScriptedEngine:
    """Every sentence alike: with `decide="sample"`, the random baseline."""
    return ScriptedEngine(lambda request: np.ones(len(request.sentences)), "random")


def build_constant_engine(sentence: str) -> ScriptedEngine:
    """Always the same sentence."""
    return ScriptedEngine(lambda request: np.array([s == sentence for s in request.sentences]), sentence)
