"""The local engine: a checkpoint loaded through transformers, and the decoder that answers under a grammar."""

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vlm_local import __version__
from vlm_local.checkpoint import Checkpoint
from vlm_local.decoding.families import Family, LoadedModel
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.prepared import PreparedRequest
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.decoding.trie import MAX_GRAMMARS
from vlm_local.decoding.writing import Pieces, ThoughtWriter
from vlm_local.engines import Outcome, as_engine_error
from vlm_local.engines.blank import BlankReadings
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing
from vlm_local.errors import EngineError, GrammarError, RequestError, VLMLocalError
from vlm_local.types import Generation, GenerationRequest, Thought, ThoughtRequest

_NUM_THREADS = torch.get_num_threads()  # what torch chose for this machine
_ONE_THREAD = 64 << 20  # bytes of weights up to which one CPU thread is fastest: see open_hf_engine
# The longest sentence that outlines may decode: each token takes a forward, and every robot of this engine waits.
MAX_OUTLINES_TOKENS = 32
_NO_SENTENCES = ("",)  # of a thought: its words are free

logger = logging.getLogger(__name__)


class DefaultDecoder:
    """Decodes with the tree decoder where the sentences' tokens form a trie, else with the outlines reference.

    refusals: first sentence of a list that outlines decodes -> why; the latest MAX_GRAMMARS, for the metadata.
    """

    def __init__(self, loaded: LoadedModel, max_batch: int = 1):
        """max_batch: as TreeDecoder's."""
        self._tree = TreeDecoder(loaded, max_batch=max_batch)
        self._loaded = loaded
        self._outlines: OutlinesDecoder | None = None
        self.refusals: dict[str, str] = {}

    @property
    def metadata(self) -> dict[str, Any]:
        """What the engine's own metadata cannot know."""
        refusals = {"decoder_refusals": dict(self.refusals)} if self.refusals else {}
        return {**self._tree.metadata, **refusals}

    def decode(self, prepared: Sequence[PreparedRequest]) -> list[Generation | RequestError]:
        """A request whose sentences cannot be decoded, or take too long, has its error in its place."""
        reasons = [self._tree.refuse(each) for each in prepared]
        fits = [each for each, reason in zip(prepared, reasons, strict=True) if reason is None]
        answers = iter(self._tree.decode(fits) if fits else ())
        return [
            next(answers) if reason is None else self._decode_slowly(each, reason)
            for each, reason in zip(prepared, reasons, strict=True)
        ]

    def read_blank(self, prepared: PreparedRequest) -> np.ndarray:
        """As the decoder's that answers such requests. Raises RequestError where `decode` has it in its place."""
        reason = self._tree.refuse(prepared)
        decoder = self._tree if reason is None else self._open_outlines(prepared, reason)
        return decoder.read_blank(prepared)

    def _decode_slowly(self, prepared: PreparedRequest, reason: str) -> Generation | RequestError:
        try:
            return self._open_outlines(prepared, reason).decode([prepared])[0]
        except (GrammarError, RequestError) as error:
            return RequestError(str(error))

    def _open_outlines(self, prepared: PreparedRequest, reason: str) -> OutlinesDecoder:
        """Raises RequestError where the reference would take too long."""
        sentences = prepared.request.sentences
        longest = max(map(len, self._loaded.tokenizer(list(sentences), add_special_tokens=False)["input_ids"]))
        if longest > MAX_OUTLINES_TOKENS:
            raise RequestError(
                f"{reason}; such choices may have {MAX_OUTLINES_TOKENS} tokens each, but one has {longest}: "
                "use shorter ones, or none that begins with another"
            )
        first = sentences[0]
        if first not in self.refusals:
            self.refusals[first] = reason
            if len(self.refusals) > MAX_GRAMMARS:
                del self.refusals[next(iter(self.refusals))]
            logger.warning("outlines decodes %r and the other sentences of its grammar: %s", first, reason)
        if self._outlines is None:
            self._outlines = OutlinesDecoder(self._loaded)
        return self._outlines

    @property
    def writer(self) -> ThoughtWriter:
        return self._tree.writer

    def forget(self, episode: str) -> None:
        self._tree.forget(episode)


class HFEngine:
    """Turns requests into tensors and has the decoder answer them.

    Both happen in the thread that owns the engine: beside a forward, Python's interpreter lock would be taken
    from it at every call into torch.
    """

    def __init__(self, checkpoint: Checkpoint, loaded: LoadedModel, decoder: str, quantize: str, max_batch: int):
        self.max_batch = max_batch
        self._processing = Processing(loaded.processor, loaded.family, loaded.dtype)
        self._family = Family(loaded)
        self._decoder = OutlinesDecoder(loaded) if decoder == "outlines" else DefaultDecoder(loaded, max_batch)
        self._blanks = BlankReadings(self._processing.prepare, self._decoder)
        self._thoughts: dict[str, Pieces] = {}  # by episode, what is being written or read
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

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Outcome]:
        start = perf_counter()
        prepared = [_try("the request could not be prepared", self._processing.prepare, each) for each in requests]
        prepare_ms = 1e3 * (perf_counter() - start)
        prepared = [self._add_blank(each) for each in prepared]
        blank_ms = 1e3 * (perf_counter() - start) - prepare_ms
        ready = [each for each in prepared if isinstance(each, PreparedRequest)]
        answers = iter(self._decode(ready) if ready else ())
        outcomes = [next(answers) if isinstance(each, PreparedRequest) else each for each in prepared]
        timings = {"prepare": prepare_ms}
        if any(request.contrast for request in requests):
            timings["blank"] = blank_ms
        return [
            replace(each, timings_ms={**timings, **each.timings_ms}) if isinstance(each, Generation) else each
            for each in outcomes
        ]

    def _add_blank(self, prepared: PreparedRequest | VLMLocalError) -> PreparedRequest | VLMLocalError:
        if isinstance(prepared, VLMLocalError) or not prepared.request.contrast:
            return prepared
        return _try("the blank picture could not be read", self._blanks.add_to, prepared)

    def _decode(self, prepared: Sequence[PreparedRequest]) -> Sequence[Outcome]:
        try:
            answers = self._decoder.decode(prepared)
            return [self._add_features(each, answer) for each, answer in zip(prepared, answers, strict=True)]
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise EngineError(f"out of memory on the GPU with {len(prepared)} requests at once: {error}") from error

    @torch.inference_mode()
    def _add_features(self, prepared: PreparedRequest, answer: Outcome) -> Outcome:
        if not prepared.request.wants_features or not isinstance(answer, Generation):
            return answer
        [features] = self._family.encode_images([prepared])
        return replace(answer, features=features.tokens.float().mean(dim=0).cpu().numpy().astype(np.float32))

    def think(self, episode: str, request: ThoughtRequest | GenerationRequest | None = None) -> str | Thought | None:
        if request is not None:
            self._thoughts[episode] = self._begin(request)
        pieces = self._thoughts.pop(episode, None)
        if pieces is None:
            raise EngineError(f"nothing is being written for {episode}: it was forgotten, or the model loaded again")
        with as_engine_error("the model could not think"), torch.inference_mode():
            try:
                piece = next(pieces)
            except StopIteration as end:
                return end.value
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                raise
        self._thoughts[episode] = pieces
        return piece

    def _begin(self, request: ThoughtRequest | GenerationRequest) -> Pieces:
        if not isinstance(self._decoder, DefaultDecoder):
            raise EngineError("this decoder keeps nothing between steps, so it cannot think")
        writer = self._decoder.writer
        if isinstance(request, GenerationRequest):
            return (yield from writer.read_ahead(self._processing.prepare(request)))
        asked = GenerationRequest(request.image, request.prompt, _NO_SENTENCES, request.episode)
        return (yield from writer.write(self._processing.prepare(asked), request.fields, request.max_tokens))

    def forget(self, episode: str) -> None:
        self._thoughts.pop(episode, None)
        self._decoder.forget(episode)

    def close(self) -> None:
        """The memory goes with the process."""


def _try(what: str, work: Callable[[Any], PreparedRequest], argument: Any) -> PreparedRequest | VLMLocalError:
    """What `work` makes of the argument, or its failure. what: see as_engine_error."""
    try:
        with as_engine_error(what):
            return work(argument)
    except VLMLocalError as error:
        return error


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
