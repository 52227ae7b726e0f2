"""A checkpoint in memory, through transformers: loaded once, asked under a grammar."""

import os
import platform
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from vlm_local import __version__
from vlm_local.checkpoint import Checkpoint
from vlm_local.decoding.types import LoadedModel, PreparedRequest
from vlm_local.engines import Outcome
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing
from vlm_local.errors import EngineError
from vlm_local.types import Generation, GenerationRequest

_NUM_THREADS = torch.get_num_threads()  # what torch chose for this machine
_ONE_THREAD = 64 << 20  # bytes of weights


class HFEngine:
    """Prepares requests, lets the decoder answer them, checks every answer."""

    def __init__(self, checkpoint: Checkpoint, loaded: LoadedModel, decoder: str, quantize: str, max_batch: int):
        self.max_batch = max_batch
        self._processing = Processing(loaded.processor, loaded.family, loaded.dtype)
        self._preparing = threading.Lock()
        self._decoder = _build_decoder(loaded, decoder, max_batch)
        self._metadata = {
            "model": checkpoint.name,
            "family": checkpoint.family,
            "checkpoint_sha256": checkpoint.sha256,
            "trained": checkpoint.sidecar.get("trained"),
            "engine": "local",
            "decoder": decoder,
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "quantize": checkpoint.quant_method or quantize,
            "memory_bytes": loaded.model.get_memory_footprint(),
            "max_batch": max_batch,
            "versions": {
                "vlm_local": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers", "outlines", "llguidance")},
            },
        }

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {**self._metadata, **getattr(self._decoder, "metadata", {})}

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        with self._preparing:  # transformers' processors promise nothing about threads
            return self._processing.prepare(request)

    def generate(self, prepared: Sequence[PreparedRequest]) -> list[Outcome]:
        try:
            generations = self._decoder.decode(prepared)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise EngineError(f"out of memory on the GPU with {len(prepared)} requests at once: {error}") from error
        for each, generation in zip(prepared, generations, strict=True):
            if isinstance(generation, Generation) and generation.sentence not in each.request.sentences:
                raise EngineError(f"the decoder left the grammar and said {generation.sentence!r}")
        return generations

    def forget(self, episode: str) -> None:
        self._decoder.forget(episode)

    def close(self) -> None:
        """The memory goes with the process."""


def open_hf_engine(
    checkpoint: Checkpoint,
    quantize: str = "none",
    device: str = "auto",
    dtype: str = "auto",
    decoder: str = "trie",
    max_batch: int = 8,
) -> HFEngine:
    """Load a checkpoint and wire its decoder, for the thread that calls.

    Raises ConfigError for what this machine cannot do. A small model on the CPU computes in one
    thread unless OMP_NUM_THREADS says otherwise: on a busy machine two, which wait for each other,
    took 13 times as long with the embedded one (1,700 ms a step, not 131).
    """
    loaded = load_model(checkpoint, quantize, device, dtype)
    if loaded.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        is_small = loaded.model.get_memory_footprint() <= _ONE_THREAD
        torch.set_num_threads(1 if is_small else _NUM_THREADS)
    return HFEngine(checkpoint, loaded, decoder, quantize, max_batch)


def _build_decoder(loaded: LoadedModel, name: str, max_batch: int):
    if name == "outlines":
        from vlm_local.decoding.outlines import OutlinesDecoder

        return OutlinesDecoder(loaded)
    from vlm_local.decoding.default import DefaultDecoder

    return DefaultDecoder(loaded, max_batch)
