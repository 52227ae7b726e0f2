"""Layers that torch.compile has fused say what the layers say as they are; here traced, without its compiler."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.decoding.test_static import EXACT, check
from tests.decoding.tiny import PHRASES, draw_request, prepare, share_tiny
from tests.tiny_models.names import FAMILIES, KEEP_A_STATE
from vlm_local.decoding.fused import attend_over_tree
from vlm_local.decoding.tree import TreeDecoder

WITH_WINDOWS = "qwen2.5-vl"  # in some layers of its vision tower
OTHERS = [family for family in FAMILIES if family not in (WITH_WINDOWS, *KEEP_A_STATE)]  # layers with one are not fused


@pytest.fixture
def traced():
    """What torch.compile counts, from nothing on."""
    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", [WITH_WINDOWS, *(pytest.param(each, marks=pytest.mark.long) for each in OTHERS)])
def test_fused_equals_plain(family, traced):
    """An episode on kept KV with pictures of two sizes, then several robots; each layer is one piece."""
    loaded, processing = share_tiny(family)
    fused, plain = (TreeDecoder(loaded, is_static=True, is_fused=is_fused) for is_fused in (True, False))
    steps = [draw_request(n, side=64 + 36 * (n % 2), episode="a", drafts=PHRASES[n : 2 * n], **EXACT) for n in range(3)]
    for batch in [[step] for step in steps] + [steps]:
        check(zip(*(each.decode(prepare(processing, *batch)) for each in (fused, plain)), strict=True))
    assert traced["frames"]["ok"] == traced["frames"]["total"] > 0 and not traced["graph_break"]


@pytest.mark.slow
def test_layers_are_as_they_were_afterwards(traced):
    loaded, processing = share_tiny("qwen2-vl")
    TreeDecoder(loaded, is_static=True, is_fused=True).decode(prepare(processing, draw_request(0)))
    num_traced = traced["frames"]["total"]
    TreeDecoder(loaded, is_static=True).decode(prepare(processing, draw_request(0)))
    assert traced["frames"]["total"] == num_traced
    assert loaded.model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_attention_over_a_tree_is_attention_under_its_mask(num_kv_heads):
    generator = torch.Generator().manual_seed(num_kv_heads)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, num_kv_heads, 7, 8, generator=generator)
    hidden = torch.rand(2, 1, 5, 7, generator=generator) < 0.5
    mask = torch.zeros(2, 1, 5, 7).masked_fill_(hidden, torch.finfo(torch.float32).min)
    module = torch.nn.Module()
    module.num_key_value_groups = 6 // num_kv_heads
    mine, theirs = (
        attend(module, query, key, value, mask, scaling=0.3)[0] for attend in (attend_over_tree, sdpa_attention_forward)
    )
    np.testing.assert_allclose(mine, theirs, atol=1e-6)
