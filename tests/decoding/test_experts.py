"""Where a forward of a mixture of experts can become a CUDA graph."""

from dataclasses import replace

import pytest
import torch

from tests.decoding.tiny import share_tiny
from vlm_local.decoding.experts import can_capture
from vlm_local.decoding.families import Family


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
