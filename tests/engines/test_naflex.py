"""Patches of LFM2-VL's pictures, against transformers' own code with Pillow for what it takes of torchvision."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import image_processing_backends

from vlm_local.engines.naflex import NaflexImageProcessorPil

_BILINEAR = Image.Resampling.BILINEAR


def _resize(images, size, interpolation, antialias):
    height, width = size
    pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in images]
    resized = [np.array(each.resize((width, height), interpolation)) for each in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def _normalize(images, mean, std, inplace):
    return (images - torch.as_tensor(mean)[:, None, None]) / torch.as_tensor(std)[:, None, None]


@pytest.fixture
def stock(monkeypatch):
    """Their class, read from its file: without torchvision transformers hides it."""
    functional = SimpleNamespace(resize=_resize, normalize=_normalize, InterpolationMode=SimpleNamespace(LANCZOS=None))
    v2 = ModuleType("torchvision.transforms.v2")
    v2.functional = functional
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, v2.__name__, v2)
    monkeypatch.setattr(image_processing_backends, "tvF", functional, raising=False)
    monkeypatch.setattr(image_processing_backends, "pil_torch_interpolation_mapping", {_BILINEAR: _BILINEAR})
    file = Path(transformers.__file__).parent / "models/lfm2_vl/image_processing_lfm2_vl.py"
    spec = importlib.util.spec_from_file_location("transformers.models.lfm2_vl.read_for_a_test", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module.Lfm2VlImageProcessor


@pytest.mark.parametrize("options", [{}, {"min_image_tokens": 32, "max_image_tokens": 64}, {"downsample_factor": 1}])
def test_a_picture_becomes_the_patches_that_transformers_makes_of_it(options, stock):
    """Sizes that are right, too small, too large, odd, long and high."""
    mine, theirs = NaflexImageProcessorPil(**options), stock(do_image_splitting=False, **options)
    for height, width in ((256, 256), (64, 64), (33, 47), (480, 640), (720, 736), (100, 1600), (1200, 90), (16, 900)):
        picture = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        own, other = mine([picture], return_tensors="pt"), theirs([[picture]], return_tensors="pt")
        for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes"):
            torch.testing.assert_close(own[name], other[name], atol=1e-6, rtol=0)


def test_a_small_picture_is_cut_by_neither_and_a_large_one_not_by_ours(stock):
    for side, tiles in ((256, 1), (640, 1), (900, 5)):  # of a square of 900: four and a thumbnail
        picture = np.full((side, side, 3), 90, np.uint8)
        assert len(stock()([[picture]], return_tensors="pt")["pixel_values"]) == tiles
        own = NaflexImageProcessorPil()([picture], return_tensors="pt")
        assert len(own["pixel_values"]) == 1
        assert int(own["spatial_shapes"].prod()) == (256 if side == 256 else 1024)  # of four of which a token is made
