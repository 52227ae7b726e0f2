"""Small random models of each family, loaded as the engine loads them, and requests for them."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import transformers

from tests.tiny_models import tiny_checkpoint
from vlm_local.checkpoint import read_kind
from vlm_local.decoding.families import LoadedModel
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.prepared import PreparedRequest
from vlm_local.decoding.session import Session
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.engines.loading import fix_rotary
from vlm_local.engines.processing import Processing, is_chat
from vlm_local.engines.processors import load_processor
from vlm_local.engines.templates import AnswerFrame, find_frame
from vlm_local.grammar import load_grammar
from vlm_local.types import GenerationRequest, Picture, Prompt

PHRASES = load_grammar("primitives").sentences
SOME = PHRASES[::3]  # as deep a trie; making one of all takes a hundredth of a second for every decoder


def load_tiny(family: str, seed: int = 0, dtype=torch.float32) -> tuple[LoadedModel, Processing]:
    """A model of its own, so that a test may change its weights."""
    loaded, processing = share_tiny(family, seed, dtype)
    return replace(loaded, model=copy.deepcopy(loaded.model)), processing


@functools.cache
def share_tiny(family: str, seed: int = 0, dtype=torch.float32) -> tuple[LoadedModel, Processing]:
    """The same model for every test that leaves it as it is."""
    folder, device = tiny_checkpoint(family, seed), torch.device("cpu")
    family, _ = read_kind(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    fix_rotary(model)
    processor = load_processor(folder, family)
    frame = find_frame(processor, folder) if is_chat(family) else AnswerFrame()
    end_token = frame.end_token_id or frame.next_token_id or model.generation_config.eos_token_id
    processor.tokenizer.eos_token_id = end_token
    loaded = LoadedModel(model, processor.tokenizer, processor, family, device, dtype, end_token, frame.lead)
    return loaded, Processing(processor, family, dtype)


def shuffle_head(loaded: LoadedModel, seed: int, scale: float = 0.6) -> None:
    """Give the output head random rows of its own, so that answers go anywhere in the trie."""
    generator = torch.Generator().manual_seed(seed)
    shape = loaded.model.lm_head.weight.shape
    rows = scale * torch.randn(shape, generator=generator)
    loaded.model.lm_head.weight = torch.nn.Parameter(rows.to(loaded.dtype))


def draw_request(seed: int, side: int = 64, before: str = "Answer in one phrase.", **options) -> GenerationRequest:
    """Noise to look at and a numbered instruction; the same for the same arguments."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
    prompt = Prompt(before, f"put spoon {seed} on the towel" + " now" * (seed % 3))
    return GenerationRequest(image, prompt, **{"sentences": SOME, **options})


def prepare(processing: Processing, *requests: GenerationRequest) -> list[PreparedRequest]:
    return [processing.prepare(request) for request in requests]


def check_along_an_episode(loaded: LoadedModel, processing: Processing, num_past: Sequence[int], **options) -> None:
    """Every decoder says the same, on kept KV, with past frames and pictures of two shapes.

    num_past: how many past frames each step shows.
    """
    shuffle_head(loaded, 5, scale=0.2)
    outlines = OutlinesDecoder(loaded)
    growing, padded = (TreeDecoder(loaded, is_static=is_static) for is_static in (False, True))
    past = [Picture(np.random.default_rng(n).integers(0, 256, (64, 64 + 40 * n, 3), np.uint8)) for n in range(2)]
    options |= {"episode": "a", "posterior": "exact", "sentences": PHRASES[::120]}
    for step, count in enumerate(num_past):
        request = draw_request(step, side=64 + 36 * (step % 2), **options)
        request = replace(request, prompt=replace(request.prompt, earlier=tuple(past[:count])))
        [prepared] = prepare(processing, request)
        [truth] = outlines.decode([prepared])
        for decoder in (growing, padded):
            [answer] = decoder.decode([prepared])
            assert answer.sentence == truth.sentence
            np.testing.assert_allclose(answer.probabilities, truth.probabilities, atol=1e-5)
            assert (answer.stats["reused_tokens"] > 0) == (step > 0)


def bias_tree(decoder: TreeDecoder, token: int, constant: float) -> TreeDecoder:
    """A model that prefers one token whatever it sees: a constant on its logit, behind every node of every trie."""

    class BiasedSession(Session):
        def score(self, nodes: Sequence[np.ndarray], hidden: Sequence[torch.Tensor]) -> list[np.ndarray]:
            scores = super().score(nodes, hidden)
            for task, logits in zip(self.tasks, scores, strict=True):
                logits[:, task.grammar.trie.live_tokens == token] += constant
            return scores

    decoder.session_type = BiasedSession
    return decoder
