"""What a training measures of its samples is what the served folder says of the same steps."""

import json

import numpy as np
import pytest
import torch

from tests.slow import FAMILIES, slow
from tests.tiny_models import tiny_checkpoint
from vlm_local.checkpoint import open_checkpoint
from vlm_local.decoding.outlines import list_allowed
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.decoding.trie import tokenize_sentences
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing
from vlm_local.grammar import load_phrase_grammar
from vlm_local.models import find_checkpoint
from vlm_local.policy import Settings, VLMPolicy
from vlm_local.primitives import format_phrase, label_episode
from vlm_local.prompts import load_template
from vlm_local.training.finetune import Batches, Tuning, compute_loss, finetune
from vlm_local.training.optimisation import Recipe
from vlm_local.training.samples import RecordedSamples, Sample
from vlm_local.types import Episode, Generation, Observation, Prompt

HISTORY, GRAMMAR = 2, load_phrase_grammar("primitives")


def _record(index):
    """Seven steps at random; pictures are of another shape and instructions of another length in each episode."""
    rng = np.random.default_rng(index)
    states = np.cumsum(rng.normal(0, 0.02, (7, 7)), axis=0).astype(np.float32)
    images = rng.integers(0, 256, (7, 64 + index, 64, 3), np.uint8)
    return Episode(index, "reach the block" + " now" * (index % 3), states, None, lambda step: images[step], "test")


def _serve(episode, template):
    """The requests of a served policy that says the labels."""
    phrases = [format_phrase(label) for label in label_episode(episode.states)[0]]
    requests = []

    def answer(request):
        requests.append(request)
        return Generation(phrases[len(requests) - 1])

    policy = VLMPolicy(answer, GRAMMAR, template, Settings(history=HISTORY, posterior="exact"))
    for step, state in enumerate(episode.states):
        policy.act(Observation(episode.load_image(step), episode.instruction, state.astype(float), step))
    return requests


def _read_logits(loaded, batch):
    """Loss of a batch, and the logits of all tokens (n, V) behind each place before one of the answers' tokens."""
    found = []
    hook = loaded.model.lm_head.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        loss, _ = compute_loss(loaded.model, batch)
    hook.remove()
    bound = getattr(loaded.model.config.get_text_config(), "final_logit_softcapping", None)
    return float(loss), found[0] if bound is None else bound * torch.tanh(found[0] / bound)


def _choose(logits, said, allowed):
    """Log-probability of the tokens `said` where at each place only those that the grammar allows can be."""
    told = 0.0
    for place, token in enumerate(said):
        choices = allowed[tuple(said[:place])]
        told += float(logits[place].double()[choices].log_softmax(0)[choices.index(token)])
    return told


@pytest.mark.parametrize("family", ["mistral3", slow("smolvlm2"), slow("qwen2-vl")])
def test_pictures_of_several_sizes_are_learnt_from_together(family):
    loaded = load_model(open_checkpoint(tiny_checkpoint(family)), device="cpu", dtype="float32")
    shapes = ((64, 64), (60, 150), (130, 40))
    samples = [Sample(np.full((*shape, 3), 90, np.uint8), Prompt("Look:", "go"), "move up") for shape in shapes]
    with torch.no_grad():
        together, *alone = (
            compute_loss(loaded.model, Batches(loaded).build(each))[0] for each in (samples, *zip(samples))
        )
    assert float(together) == pytest.approx(float(sum(alone)), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_served_answer(family, tmp_path):
    """Of adapters that were trained, on an episode that was held out, padded in one batch."""
    prompt = "paligemma" if family.startswith("paligemma") else "chat"
    template, base = load_template(prompt), open_checkpoint(tiny_checkpoint(family))
    samples = RecordedSamples(map(_record, range(20)), template, HISTORY, seed=0)
    tuning = Tuning(Recipe(2, 0.05, warmup_steps=0), samples=2, lora=2, device="cpu")
    finetune(base, samples, tuning, prompt, HISTORY, tmp_path, seed=0, data={})
    *_, logged = map(json.loads, (tmp_path / "training" / "log.jsonl").read_text().splitlines())

    loaded = load_model(find_checkpoint(str(tmp_path), offline=True), device="cpu", dtype="float32")
    asked = samples.draw_held_out(4)  # the steps of one episode that have a full window
    requests = _serve(_record(len(asked[0].image) - 64), template)
    assert [each.prompt for each in asked] == [each.prompt for each in requests[: len(asked)]]
    batch = Batches(loaded).build(asked)
    loss, logits = _read_logits(loaded, batch)
    answers = [row[row >= 0].tolist() for row in batch["labels"]]
    assert loss / len(logits) == pytest.approx(logged["loss held_out"], abs=2e-5)
    labels = batch["labels"][batch["labels"] >= 0]
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")), rel=1e-6)

    prepared = [
        Processing(loaded.processor, loaded.family, loaded.dtype).prepare(each) for each in requests[: len(asked)]
    ]
    tokens = tokenize_sentences(
        loaded.tokenizer, GRAMMAR.sentences, int(prepared[0].input_ids[-1]), loaded.eos_token_id, loaded.lead
    )
    allowed = list_allowed(tokens, loaded.eos_token_id)
    rows = logits.split([len(answer) for answer in answers])
    for sample, answer, row, served in zip(asked, answers, rows, TreeDecoder(loaded).decode(prepared), strict=True):
        probability = served.probabilities[GRAMMAR.sentences.index(sample.phrase)]
        assert np.log(probability) == pytest.approx(_choose(row, answer, allowed), abs=1e-4)
