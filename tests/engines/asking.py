"""Questions to an engine behind an API."""

import numpy as np

from vlm_local.grammar import load_grammar
from vlm_local.types import GenerationRequest, Prompt

SENTENCES = load_grammar("primitives_no_rotation").sentences
PROMPT = Prompt("Move the arm.", "Which way?")


def build_request(seed=0, sentences=SENTENCES, robot="robot", side=16, **options):
    image = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return GenerationRequest(image, PROMPT, sentences, episode=f"{robot}/1", **options)


def ask(engine, **options):
    (outcome,) = engine.generate([build_request(**options)])
    return outcome
