"""The tiny model's own batches mean what transformers' processor and forward mean."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlm_local.checkpoint import open_checkpoint
from vlm_local.decoding.families import Family
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing
from vlm_local.prompts import Frame, build_prompt, load_template
from vlm_local.training.batches import BatchBuilder, TrainableTiny
from vlm_local.training.collect import shrink
from vlm_local.training.examples import Example
from vlm_local.training.finetune import Batches, compute_loss
from vlm_local.training.questions import Question
from vlm_local.training.samples import Sample
from vlm_local.training.tiny import show_first_picture, write_tiny
from vlm_local.training.wordings import UNKNOWN
from vlm_local.types import GenerationRequest, Observation, Picture

PROPRIO = np.array([[0.25, -0.012, 0.1, 0, 0, 0.1, 1.0], [0.3, 0.1, 0.05, 0, 0, 0, 0.4]], np.float32)
RED, NOWHERE = {"colour": "red"}, (float("nan"),) * 3
QUESTIONS = [
    [
        Question("reach", RED, "reach the red block", "move forward", 0, (0.1, 0, 0)),
        Question("reach", RED, "stop it", "stop", 0, NOWHERE),
    ],
    [Question("open_drawer", {}, "open the drawer", "move left up, close gripper", 5, (0, 0.1, 0.1))],
]
PLAIN = np.tile(np.array([[1.0] * 3, [0.0] * 3]), (2, 1, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, seed=0)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(open_checkpoint(folder))


@pytest.fixture(scope="module")
def images():
    """uint8 (2, 256, 256, 3), smooth enough that shrinking matters."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).resize((256, 256))) for each in noise])


THINGS = [QUESTIONS[0][:1], QUESTIONS[1]]


NO_TOKENS = torch.tensor([], dtype=torch.int64)


def _build(folder, loaded, images, shown=(True, True), things=THINGS, questions=QUESTIONS):
    examples = [
        Example(shrink(image, 128), proprio, asked, named)
        for image, proprio, asked, named in zip(images, PROPRIO, questions, things, strict=True)
    ]
    return BatchBuilder(folder, loaded).build(examples, np.array(shown), PLAIN)


def _list_samples(folder, images, shown=(True, True)):
    template = load_template(folder / "prompt.txt")
    for image, proprio, asked, told in zip(images, PROPRIO, QUESTIONS, shown, strict=True):
        for question in asked:
            observation = Observation(image, question.instruction, proprio.astype(float) if told else None)
            yield Sample(image, build_prompt(template, observation), question.phrase)


@pytest.mark.parametrize("shown", [(True, True), (False, True)])
def test_tokens_and_pixels_are_those_of_the_processor(folder, loaded, images, shown):
    batch = _build(folder, loaded, images, shown)
    for row, sample in enumerate(_list_samples(folder, images, shown)):
        theirs = Batches(loaded).build([sample])
        length = theirs["input_ids"].shape[1]
        assert batch.ids[row, : length - 1].tolist() == theirs["input_ids"][0, :-1].tolist()
        assert batch.targets[row, : length - 1].tolist() == theirs["labels"][0, 1:].tolist()
        assert (batch.targets[row, length - 1 :] == -100).all()
        start = 64 * int(batch.picture[row])
        assert torch.allclose(batch.pixels[start : start + 64], theirs["pixel_values"], atol=1e-6)


def test_a_first_picture_is_shown_as_the_server_shows_a_past_frame(folder, loaded, images, tmp_path):
    folder = show_first_picture(folder, tmp_path / "memory")
    first, second = (shrink(image, 128) for image in images)
    examples = [  # only the second picture is asked about
        Example(first, PROPRIO[0], [], THINGS[0]),
        Example(second, PROPRIO[1], QUESTIONS[1], THINGS[1], first),
    ]
    batch = BatchBuilder(folder, loaded).build(examples, np.array([True, True]), PLAIN)
    (question,) = QUESTIONS[1]
    observation = Observation(images[1], question.instruction, PROPRIO[1].astype(float))
    prompt = build_prompt(load_template(folder / "prompt.txt"), observation, frames=[Frame(0, Picture(images[0]))])
    prepared = Processing(loaded.processor, loaded.family, loaded.dtype).prepare(
        GenerationRequest(images[1], prompt, (question.phrase,))
    )
    head, theirs = prepared.input_ids, prepared.join_vision()
    assert batch.ids[0, : len(head)].tolist() == head.tolist()
    assert batch.positions[:, 0, : len(head)].tolist() == Family(loaded).position_prompt(prepared)[0].tolist()
    shown = torch.cat([batch.pixels[64 * place : 64 * place + 64] for place in batch.picture.tolist()])
    assert torch.allclose(shown, theirs["pixel_values"], atol=1e-6)
    tail = batch.targets[0, len(head) - 1 :]
    types = nn.functional.pad(theirs.pop("mm_token_type_ids"), (0, len(tail)))
    logits = loaded.model(**theirs, mm_token_type_ids=types, input_ids=torch.cat([head, tail])[None]).logits[0]
    loss = nn.functional.cross_entropy(logits[len(head) - 1 : -1], tail)
    assert TrainableTiny(loaded.model, NO_TOKENS)(batch)[1]["answer"] == pytest.approx(float(loss), rel=1e-5)


def test_the_loss_is_that_of_the_models_own_forward(folder, loaded, images):
    theirs = sum(compute_loss(loaded.model, Batches(loaded).build([s]))[0] for s in _list_samples(folder, images))
    batch = _build(folder, loaded, images)
    num_tokens = int((batch.targets != -100).sum())
    _, measured = TrainableTiny(loaded.model, NO_TOKENS)(batch)
    assert measured["answer"] * num_tokens == pytest.approx(float(theirs), rel=1e-5)


def test_the_auxiliary_loss_teaches_every_part_of_the_model(folder, loaded, images):
    model = loaded.model.requires_grad_(True)
    trainable = TrainableTiny(model, NO_TOKENS)
    loss, _ = trainable(_build(folder, loaded, images))
    loss.backward()
    without = [name for name, parameter in trainable.named_parameters() if parameter.grad is None]
    assert not without


def test_what_is_not_in_the_picture_counts_for_no_auxiliary_loss(folder, loaded, images):
    torch.manual_seed(0)
    trainable = TrainableTiny(loaded.model, NO_TOKENS)
    both, one, none = (
        trainable(_build(folder, loaded, images, things=t))[1] for t in (THINGS, [[], THINGS[1]], [[], []])
    )
    assert both["answer"] == one["answer"] == none["answer"]  # the words ask the same
    assert len({each["auxiliary"] for each in (both, one, none)}) == 3
    assert 0 < none["auxiliary"] < both["auxiliary"]  # where the thing is that is meant


def test_an_unknown_word_is_read_and_does_not_learn_from_it(folder, loaded, images):
    unknown = BatchBuilder(folder, loaded).find_tokens(UNKNOWN)
    words = replace(QUESTIONS[0][0], instruction=f"reach the {UNKNOWN} block")
    batch = _build(folder, loaded, images, questions=[[words], QUESTIONS[1]])
    assert torch.isin(batch.ids, unknown).sum() == 1
    table = loaded.model.requires_grad_(True).get_input_embeddings().weight

    def learn(ids):
        table.grad = None
        loss, measured = TrainableTiny(loaded.model, ids)(batch)
        loss.backward()
        return measured["answer"], table.grad[unknown].norm()

    answer, as_output = learn(unknown)
    same_answer, as_input = learn(NO_TOKENS)
    assert answer == same_answer
    assert 0 < as_output < as_input / 5
