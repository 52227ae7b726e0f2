"""What a step could cost at best: of every family that can be asked."""

import json

import numpy as np
import pytest
import torch

from tests.tiny_models import tiny_checkpoint
from tests.tiny_models.names import MIXED
from vlm_local.bench import limit
from vlm_local.bench.subject import load_subject
from vlm_local.cli import main
from vlm_local.decoding.experts import measure_share
from vlm_local.decoding.families import Family
from vlm_local.machine import DeviceRates
from vlm_local.policy_options import PolicyOptions


def prepare(family):
    subject = load_subject(PolicyOptions(model=str(tiny_checkpoint(family))), None, None)
    return subject, subject.prepare(subject.draw_request(np.random.default_rng(0), "a"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "qwen3.5-moe",
        "glm4v",
        "lfm2-vl",
        "internvl",
        "mistral3",
        "gemma3",
        "gemma4",
        "gemma4-26b",
        "molmo2",
        "smolvlm2",
        "paligemma2",
        "qwen2-vl",
    ],
)
def test_both_halves_of_a_family_are_timed(family, monkeypatch, capsys):
    """Traced, which takes most of the time, for one family: a trace that fails is a warning here anyhow."""
    monkeypatch.setattr(limit, "LENGTHS", (16,))
    with torch.compiler.set_stance("default" if family == "qwen2-vl" else "force_eager"):
        assert main(["bench", "limit", "--model", str(tiny_checkpoint(family))]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["forwards"]) == {"16 tokens", "vision"}
    assert all(told["least_ms"] > 0 and told["ms"] > 0 for told in result["forwards"].values())


@pytest.mark.parametrize(("family", "keeps_text"), [("paligemma2", False), ("qwen3.5", True)])
def test_the_least_step_reads_the_text_again_where_nothing_of_it_is_kept(family, keeps_text):
    subject, prepared = prepare(family)
    counted = []

    class Rates(DeviceRates):
        def find_least_ms(self, num_weights, num_bytes, tokens):
            counted.append(tokens)
            return super().find_least_ms(num_weights, num_bytes, tokens)

    assert limit.find_least_step_ms(subject, prepared, Rates(1e9, 1e9)) > 0
    assert counted[0] == len(prepared.input_ids) - (prepared.before_length if keeps_text else 0)


def test_neither_padding_of_a_picture_nor_a_table_of_tokens_is_work():
    subject, prepared = prepare("gemma4")
    counted = []

    class Rates(DeviceRates):
        def find_least_ms(self, num_weights, num_bytes, tokens):
            counted.append((num_weights, tokens))
            return super().find_least_ms(num_weights, num_bytes, tokens)

    limit.find_least_step_ms(subject, prepared, Rates(1e9, 1e9))
    model = subject.loaded.model.model.language_model
    tables = model.embed_tokens.weight.numel() + model.embed_tokens_per_layer.weight.numel()
    num_tokens = int((prepared.input_ids == subject.loaded.model.config.image_token_id).sum())
    assert counted[0][0] == sum(each.numel() for each in model.parameters()) - tables
    assert counted[1][1] == 9 * num_tokens  # patches of which a token is made


@pytest.mark.parametrize("family", MIXED)
def test_a_token_of_a_mixture_meets_some_experts_and_a_prompt_reads_nearly_all(family):
    subject, prepared = prepare(family)
    family, counted = Family(subject.loaded), []

    class Rates(DeviceRates):
        def find_least_ms(self, *counts):
            counted.append(counts)
            return super().find_least_ms(*counts)

    assert limit.find_least_step_ms(subject, prepared, Rates(1e9, 1e9)) > 0
    named = dict(family.language_model.named_parameters())
    experts = sum(each.numel() for name, each in named.items() if ".experts." in name)
    others = sum(each.numel() for each in named.values()) - experts - family.embedding.weight.numel()
    num_weights, num_bytes, _ = counted[0]
    assert num_weights == others + experts // 4  # 2 of 8
    assert num_bytes == pytest.approx(4 * (others + experts), rel=1e-6)
    assert [measure_share(family, count) for count in (1, 2)] == [0.25, 0.4375]
