"""Engines turn requests into sentences. Heavy imports happen in the module of the engine asked for."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vlm_local.errors import EngineError
from vlm_local.types import Generation, GenerationRequest


class Engine(Protocol):
    """Owned by one thread; `generate` is never entered twice at once."""

    max_batch: int

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | EngineError]:
        """Answer 1 to `max_batch` requests in their order. Each sentence is one of its request's.

        A request that failed alone has its EngineError in its place. Raises EngineError where the
        model failed for all; they are then tried again one by one.
        """

    def forget(self, episode: str) -> None:
        """Drop what is kept for this episode (KV, drafts)."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """model, family, checkpoint hash, device, dtype, quantize, trained, versions: JSON values."""
