"""Engines turn requests into sentences. Heavy imports happen in the module of the engine asked for."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vlm_local.errors import EngineError
from vlm_local.types import Generation, GenerationRequest


class Engine(Protocol):
    """Owned by one thread, but for `prepare`; `generate` is never entered twice at once."""

    max_batch: int

    def prepare(self, request: GenerationRequest) -> Any:
        """What `generate` takes in the request's place: all that can be done before its turn.

        Any thread may call it, also while `generate` runs. Raises RequestError for a request that
        can never be answered.
        """

    def generate(self, prepared: Sequence[Any]) -> list[Generation | EngineError]:
        """Answer 1 to `max_batch` prepared requests in their order. Each sentence is one of its request's.

        A request that failed alone has its EngineError in its place. Raises EngineError where the
        model failed for all; they are then tried again one by one.
        """

    def forget(self, episode: str) -> None:
        """Drop what is kept for this episode (KV, drafts)."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """model, family, checkpoint hash, device, dtype, quantize, trained, versions: JSON values."""
