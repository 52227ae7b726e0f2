"""Where a forward can become a CUDA graph: of a mixture of experts, and of quantised weights."""

from dataclasses import replace

import pytest
import torch

from tests.decoding.tiny import share_tiny
from tests.tiny_models import tiny_checkpoint
from vlm_local.checkpoint import open_checkpoint
from vlm_local.decoding.families import Family
from vlm_local.decoding.static import can_capture
from vlm_local.engines.loading import load_model


@pytest.mark.parametrize(
    ("family", "capability", "dtype", "expected"),
    [
        ("qwen3-vl-moe", (9, 0), torch.bfloat16, True),
        ("qwen3.5-moe", (10, 0), torch.bfloat16, True),
        ("qwen3-vl-moe", (9, 0), torch.float32, False),
        ("qwen3-vl-moe", (8, 0), torch.bfloat16, False),
        ("qwen3.5-moe", (12, 0), torch.bfloat16, False),
        ("qwen3-vl", (8, 0), torch.float32, True),
    ],
)
def test_graphs_hold_experts_where_torch_has_a_kernel_for_them(family, capability, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    loaded, _ = share_tiny(family)
    assert can_capture(Family(replace(loaded, dtype=dtype))) is expected


@pytest.mark.parametrize(("quantize", "expected"), [("8bit", False), ("4bit", True)])
def test_graphs_hold_no_8_bit_layers_which_read_back_the_columns_that_outgrow_8_bits(quantize, expected):
    loaded = load_model(open_checkpoint(tiny_checkpoint("qwen2-vl")), quantize, device="cpu")
    assert can_capture(Family(loaded)) is expected
