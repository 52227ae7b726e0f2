"""How fast a step could be: the device's bandwidth and arithmetic, and what the model's halves take of them."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from vlm_local.bench import Measured
from vlm_local.bench.subject import Subject
from vlm_local.decoding.experts import has_experts, measure_share
from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import Kept
from vlm_local.decoding.fused import FusedLayers
from vlm_local.decoding.layout import Chunk
from vlm_local.decoding.prepared import PreparedRequest, find_layout
from vlm_local.decoding.session import count_reusable
from vlm_local.decoding.static import StaticForwards, can_capture
from vlm_local.machine import DeviceRates

LENGTHS = (16, 64, 128, 192, 256, 384, 512, 1024)  # tokens of a chunk: a few nodes to a whole prompt and draft
_KEPT = 256  # columns of KV before it
_COPIED = {"cuda": 2 << 30, "cpu": 1 << 28}  # bytes, far more than a cache holds
_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices that are multiplied
_WARM_UP, _RUNS = 3, 10


def measure(subject: Subject) -> Measured:
    """Times a copy, a matrix product, the language model over chunks of LENGTHS and the vision tower over a picture.

    Both halves run as they are and, where layers can be, fused; on a CPU fused layers are traced and not compiled.
    """
    family = Family(subject.loaded)
    rates = measure_rates(subject)
    prepared = subject.prepare(subject.draw_request(np.random.default_rng(0), "a"))
    captures = subject.loaded.device.type == "cuda" and can_capture(family)
    kinds = {"": StaticForwards(family, captures)}
    if not family.is_recurrent:
        kinds["fused_"] = StaticForwards(family, captures, fused=FusedLayers(family))
    halves = {f"{length} tokens": _build_forward(family, length) for length in LENGTHS}
    halves["vision"] = lambda forwards: forwards.encode_images([prepared])
    least_ms = _find_least(subject, prepared, rates)
    chunks = {}
    for name, run in halves.items():
        times = {kind: _median_ms(subject, functools.partial(run, forwards)) for kind, forwards in kinds.items()}
        chunks[name] = {"least_ms": round(least_ms[name], 3)}
        for kind, ms in times.items():
            chunks[name] |= {f"{kind}ms": round(ms, 3), f"{kind}share": round(least_ms[name] / ms, 3)}
    num_weights, num_bytes = _count(_list_language(family))
    result = {
        "benchmark": "limit",
        **subject.about,
        "copy_gb_per_s": round(rates.bytes_per_s / 1e9, 1),
        "product_tflop_per_s": round(rates.operations_per_s / 1e12, 2),
        "language_weights": num_weights,
        "language_bytes": num_bytes,
        "graphs": {f"{kind}layers": forwards.metadata for kind, forwards in kinds.items()},
        "forwards": chunks,
    }
    lines = [f"copy {result['copy_gb_per_s']:.0f} GB/s, product {result['product_tflop_per_s']:.1f} TFLOP/s"]
    for name, told in chunks.items():
        reached = f"{told['ms']:7.2f} as it is ({told['share']:.0%} reached)"
        fused = f", {told['fused_ms']:7.2f} fused ({told['fused_share']:.0%})" if "fused_ms" in told else ""
        lines.append(f"{name:>12}: at least {told['least_ms']:7.2f} ms, {reached}{fused}")
    return lines, result


def measure_rates(subject: Subject) -> DeviceRates:
    """Of the model's device, in its dtype."""
    return DeviceRates(_measure_copy(subject), _measure_product(subject))


def find_least_step_ms(subject: Subject, prepared: PreparedRequest, rates: DeviceRates) -> float:
    """The least milliseconds of a step: one pass of the vision tower over the picture, one of the language model over
    what is not kept from the step before: the picture and the text behind it, in most families.
    """
    family = Family(subject.loaded)
    tokens = len(prepared.input_ids) - count_reusable(family, prepared)
    return _find_least_language_ms(family, tokens, rates) + _find_least_vision_ms(subject, prepared, rates)


def _find_least_vision_ms(subject: Subject, prepared: PreparedRequest, rates: DeviceRates) -> float:
    family = Family(subject.loaded)
    others = [family.embedding.weight, *family.head.parameters(), *family.language_model.parameters()]
    known = {id(each) for each in others}
    vision = [each for each in subject.loaded.model.parameters() if id(each) not in known]
    return rates.find_least_ms(*_count(vision), _count_patches(subject, prepared))


def _find_least(subject: Subject, prepared: PreparedRequest, rates: DeviceRates) -> dict[str, float]:
    """Of each half that `measure` times."""
    family = Family(subject.loaded)
    least_ms = {f"{length} tokens": _find_least_language_ms(family, length, rates) for length in LENGTHS}
    return least_ms | {"vision": _find_least_vision_ms(subject, prepared, rates)}


def _count_patches(subject: Subject, prepared: PreparedRequest) -> int:
    """Pieces into which the vision tower cuts the present picture."""
    num_pixels = math.prod(find_layout(prepared).shape)
    config = subject.loaded.model.config.vision_config
    side = int(np.ravel(config.patch_size)[0])  # InternVL's is a pair
    return num_pixels // (3 * side**2 * getattr(config, "temporal_patch_size", 1))


def _find_least_language_ms(family: Family, num_tokens: int, rates: DeviceRates) -> float:
    """Of a mixture's experts, each token meets a few, and those that all tokens together meet are read."""
    num_weights, num_bytes = _count(_list_language(family, of_experts=False))
    if has_experts(family.language_model.config):
        num_experts, expert_bytes = _count(_list_language(family, of_experts=True))
        num_weights += int(num_experts * measure_share(family, 1))
        num_bytes += int(expert_bytes * measure_share(family, num_tokens))
    return rates.find_least_ms(num_weights, num_bytes, num_tokens)


def _list_language(family: Family, of_experts: bool | None = None) -> list[torch.Tensor]:
    """Weights of the language model without tables of tokens, of which only rows are read. of_experts: only those
    that belong to experts, or only the others.
    """
    tables = {id(each.weight) for each in family.language_model.modules() if isinstance(each, torch.nn.Embedding)}
    named = family.language_model.named_parameters()
    return [each for name, each in named if id(each) not in tables and of_experts in (None, ".experts." in name)]


def _count(weights: Sequence[torch.Tensor]) -> tuple[int, int]:
    return sum(each.numel() for each in weights), sum(each.nbytes for each in weights)


def _measure_copy(subject: Subject) -> float:
    """Bytes read and bytes written a second."""
    device = subject.loaded.device
    source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / _median_ms(subject, lambda: target.copy_(source))


def _measure_product(subject: Subject) -> float:
    """Multiplications and additions a second, in the model's dtype."""
    device, dtype = subject.loaded.device, subject.loaded.dtype
    side = _SIDE[device.type]
    one, other = (torch.randn((side, side), device=device).to(dtype) for _ in range(2))
    return 2e3 * side**3 / _median_ms(subject, lambda: one @ other)


def _build_forward(family: Family, length: int) -> Callable[[StaticForwards], object]:
    """A chunk of made-up tokens behind KV that is kept, one row; a prompt behind nothing where there are states."""
    generator = np.random.default_rng(length)
    num_kept = 0 if family.is_recurrent else _KEPT
    shapes = [(len(each.layers), 2, each.num_heads, num_kept, each.head_dim) for each in family.kv_shapes]
    zeros = tuple(torch.zeros(shape, dtype=family.dtype, device=family.device) for shape in shapes)
    kept = Kept(zeros) if num_kept else None
    visible = np.concatenate([np.ones((length, num_kept), dtype=bool), np.tri(length, dtype=bool)], axis=1)[None]
    positions = np.broadcast_to(num_kept + np.arange(length), (family.axes, 1, length))
    near = None if family.window is None else visible
    token_ids = generator.integers(0, family.embedding.num_embeddings, (1, length))
    split = length if family.is_recurrent else 0
    chunk = Chunk(token_ids, positions, np.array([length]), np.array([0]), split, visible, near)
    last = [np.array([length - 1])]

    def run(forwards: StaticForwards) -> object:
        kv = forwards.open([kept], num_kept + length)
        assert kv is not None  # _KEPT and the lengths measured fit a static buffer
        return kv.run(chunk, (), last)

    return run


@torch.inference_mode()
def _median_ms(subject: Subject, compute: Callable[[], object]) -> float:
    times = [subject.time(compute)[1] for _ in range(_WARM_UP + _RUNS)]
    return float(np.median(times[_WARM_UP:]))
