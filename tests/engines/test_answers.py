"""Typed questions to each kind of model: the choices and nothing else, with the oracle's probabilities."""

import shutil

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText

from tests.slow import slow
from tests.tiny_models import tiny_checkpoint
from vlm_local.answers import Answerer, Question
from vlm_local.assembly import open_policies
from vlm_local.checkpoint import open_checkpoint
from vlm_local.engines.hf import open_hf_engine
from vlm_local.policy_options import PolicyOptions
from vlm_local.prompts import load_template

ASKED = (
    ("is the drawer open? answer yes or no", ("yes", "no")),
    ("where is the eggplant?", ("sink", "basket", "invalid")),
    ("what is it?", ("a red block", "a red block, moved", "a blue block")),
)


def draw_image(seed):
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def open_answerer(folder, family, decoder):
    engine = open_hf_engine(open_checkpoint(folder), device="cpu", dtype="float32", decoder=decoder)
    template = load_template("paligemma_answer" if family.startswith("paligemma") else "answer")
    return Answerer(lambda request: engine.generate([request])[0], template)


@pytest.mark.parametrize("family", ["qwen2-vl", "paligemma2", slow("smolvlm2")])
def test_each_kind_of_model_answers_with_the_oracles_probabilities(family):
    folder = tiny_checkpoint(family)
    fast, oracle = (open_answerer(folder, family, decoder) for decoder in ("trie", "outlines"))
    for seed, (text, choices) in enumerate(ASKED):
        question = Question(draw_image(seed), text, choices)
        ours, reference = fast.answer(question), oracle.answer(question)
        assert ours.choice == reference.choice == max(ours.probabilities, key=ours.probabilities.get)
        assert ours.probabilities == pytest.approx(reference.probabilities, abs=1e-4)
        assert sum(ours.probabilities.values()) == pytest.approx(1, abs=1e-4)


def test_a_lora_detector_answers_by_its_folder(tmp_path):
    """As AutoEval fine-tunes its PaliGemma: rank 8 on all projections of the language model."""
    from peft import LoraConfig, get_peft_model  # three seconds, which not every process that collects this file needs

    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("paligemma"), base)
    names = ["q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(base),
        LoraConfig(r=8, target_modules=names, task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    question = Question(draw_image(0), *ASKED[0])
    answers = []
    for folder in (base, tmp_path / "adapter"):
        policies = open_policies(PolicyOptions(model=str(folder), device="cpu", dtype="float32"))
        try:
            policies.worker.wait_loaded()
            answers.append(policies.answerer.answer(question))
        finally:
            policies.close()
    assert answers[0].probabilities != pytest.approx(answers[1].probabilities, abs=1e-3)
    assert sum(answers[1].probabilities.values()) == pytest.approx(1, abs=1e-4)
