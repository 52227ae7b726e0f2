"""The decoder's tensor work on cuda:0 in bfloat16, for every family: run by tests/cuda_dry.sh.

Without a GPU the model is made of fake tensors: shapes, devices and dtypes are checked, values are
not there, so the logits that steer the decoder are drawn at random. With a GPU the model is real.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests.decoding.tiny import PHRASES, draw_request, load_tiny, prepare
from tests.tiny_models.names import FAMILIES, MIXED
from vlm_local.decoding import forward, recurrent, session, tree
from vlm_local.decoding.families import Family, LoadedModel
from vlm_local.decoding.prepared import ImageFeatures, find_layout
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.engines.processing import Processing

CUDA = torch.device("cuda:0")
HAS_GPU = torch.cuda.is_available()


MODE = FakeTensorMode(allow_non_fake_inputs=True)


class SameDtype(TorchFunctionMode):
    """Fake tensors let a product of two dtypes pass; a GPU does not."""

    products = (
        torch.nn.functional.linear,
        torch.nn.functional.grouped_mm,
        torch.matmul,
        torch.nn.functional.scaled_dot_product_attention,
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.products:
            tensors = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, torch.Tensor)]
            dtypes = {each.dtype for each in tensors if each.is_floating_point()}
            assert len(dtypes) == 1, f"{func.__name__} of dtypes {dtypes}"
        return func(*args, **(kwargs or {}))


def under_mode(function):
    def run(*args, **kwargs):
        # Inference mode hides copies to the device from fake tensors, which then ask for a driver.
        with torch.inference_mode(False), torch.no_grad(), MODE, SameDtype():
            return function(*args, **kwargs)

    return run


class DrySession(session.Session):
    """Reads the head and draws what it would have said."""

    generator = np.random.default_rng(0)
    narrow = under_mode(session.Session.narrow)

    @under_mode
    def score(self, nodes, hidden):
        scores = [task.grammar.head.read(each) for task, each in zip(self.tasks, hidden, strict=True)]
        for task, each, logits in zip(self.tasks, nodes, scores, strict=True):
            assert logits.device == CUDA and logits.dtype == torch.float32
            assert logits.shape == (len(each), len(task.grammar.trie.live_tokens))
        return [self.generator.normal(size=tuple(each.shape)) for each in scores]


class DryFamily(Family):
    """Features of the right shape; the vision tower itself is transformers' own and mostly asks for values."""

    def encode_images(self, prepared):
        levels = 1 if hasattr(self.language_model, "_deepstack_process") else 0
        counts = [np.count_nonzero(each.input_ids.numpy() == self.image_token_id) for each in prepared]
        return [ImageFeatures(self._make(count), tuple(self._make(count) for _ in range(levels))) for count in counts]

    @under_mode
    def _make(self, count):
        return torch.empty(count, self.embedding.weight.shape[1], dtype=self.dtype, device=self.device)


@under_mode
def put_on_fake_gpu(model) -> None:
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=torch.bfloat16, device=CUDA)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)


@pytest.fixture(params=[*FAMILIES, "gemma4-31b", "mistral3-small", "molmo2-o"])
def decoder(request, monkeypatch):
    """TreeDecoder and a function that prepares requests, on the GPU there is or a fake one."""
    loaded, processing = load_tiny(request.param, dtype=torch.bfloat16)
    if HAS_GPU:
        loaded.model.to(CUDA)
        processing = Processing(loaded.processor, loaded.family, torch.bfloat16)
    else:
        put_on_fake_gpu(loaded.model)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        for kind in (forward.DynamicKV, recurrent.RecurrentKV):
            for name in ("__init__", "run", "copy_columns", "narrow"):
                monkeypatch.setattr(kind, name, under_mode(getattr(kind, name)))
        monkeypatch.setattr(tree, "Head", under_mode(tree.Head))
        monkeypatch.setattr(tree, "Family", DryFamily)
        monkeypatch.setattr(TreeDecoder, "session_type", DrySession)
    on_gpu = LoadedModel(**{**vars(loaded), "device": CUDA})
    build = TreeDecoder if HAS_GPU else under_mode(TreeDecoder)
    # Graphs and pinned memory need a driver: what tests/gpu.sh is for.
    return build(on_gpu, is_static=HAS_GPU), lambda *requests: prepare(processing, *requests)


def test_prefill_with_draft_then_steps(decoder):
    decode, ready = decoder
    for seed, options in enumerate(({}, {"decide": "map"}, {"decide": "sample", "uniform": 0.5, "temperature": 2.0})):
        [answer] = decode.decode(ready(draw_request(seed, drafts=PHRASES[5:9], **options)))
        assert answer.sentence in PHRASES


def test_posteriors(decoder):
    decode, ready = decoder
    fast, exact = decode.decode(ready(*(draw_request(0, posterior=kind) for kind in ("fast", "exact"))))
    assert exact.probabilities.sum() == pytest.approx(1.0) and fast.probabilities.sum() <= 1.0 + 1e-9


def test_a_ragged_batch_with_kept_kv(decoder):
    decode, ready = decoder
    requests = [
        draw_request(0, episode="a"),
        draw_request(1, before="Another text, and a longer one.", episode="b", posterior="fast"),
        draw_request(2, sentences=("yes", "no")),
    ]
    decode.decode(ready(requests[0]))
    answers = decode.decode(ready(*requests))
    assert all(each.sentence in request.sentences for request, each in zip(requests, answers, strict=True))
    again = decode.decode(ready(*requests[:2]))
    keeps = not decode._family.is_bidirectional
    assert [each.stats["reused_tokens"] > 0 for each in again] == [keeps, keeps]


def test_a_near_tie_goes_the_plain_path(decoder):
    decode, ready = decoder
    decode._near_tie, decode._settles_ties = np.inf, True
    [answer] = decode.decode(ready(draw_request(0)))
    assert answer.stats["near_tie"] == 1


@pytest.mark.parametrize("decoder", ["gemma4", "gemma4-31b", "lfm2-vl", "mistral3"], indirect=True)
def test_a_vision_tower_that_is_run_in_parts_asks_for_no_value(decoder):
    decode, ready = decoder
    [prepared] = ready(draw_request(0, side=100))
    layout = find_layout(prepared)

    def encode():
        pixels = torch.zeros(2, *layout.shape[1:], dtype=torch.bfloat16, device=CUDA)
        return decode._family.encode_pixels(pixels, layout, 2)

    for features in (encode if HAS_GPU else under_mode(encode))():
        assert (features.tokens.device, features.tokens.dtype) == (CUDA, torch.bfloat16)
        assert len(features.tokens) == np.count_nonzero(prepared.input_ids.numpy() == decode._family.image_token_id)


@pytest.mark.skipif(HAS_GPU, reason="another card than this one")
@pytest.mark.parametrize("decoder", MIXED, indirect=True)
def test_on_a_card_without_a_kernel_for_experts_there_are_no_graphs(decoder, monkeypatch):
    decode, ready = decoder
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    plain = under_mode(TreeDecoder)(decode._loaded)
    assert plain.metadata == {} and plain.decode(ready(draw_request(0)))[0].sentence in PHRASES


@pytest.mark.parametrize("decoder", ["qwen2-vl"], indirect=True)
@pytest.mark.parametrize("mistake", ["device", "dtype"])
def test_a_mistake_is_found(decoder, mistake, monkeypatch):
    """What the other tests would show if a mask stayed on the CPU, or if embeddings were float32."""
    decode, ready = decoder
    if mistake == "dtype":
        decode._family.dtype = torch.float32
    else:
        monkeypatch.setattr(forward, "_build_mask", lambda family, visible: torch.zeros(visible.shape)[:, None])
    with pytest.raises(Exception, match=r"device|dtype"):
        decode.decode(ready(draw_request(0)))
