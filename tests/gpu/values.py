"""Does the device say what it should: the tree decoder against outlines, for every family.

float32: phrase for phrase, every probability within 1e-4. bfloat16 and quantised weights: phrase for phrase but for
near ties, where the decoder has seen that it could not tell. Exits with 1 where that does not hold.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from tests.decoding.tiny import PHRASES, draw_request, prepare
from tests.tiny_models import tiny_checkpoint
from tests.tiny_models.names import FAMILIES
from vlm_local.checkpoint import open_checkpoint
from vlm_local.checkup.scores import count_disagreements
from vlm_local.decoding.families import LoadedModel
from vlm_local.decoding.graphs import GraphPool
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing
from vlm_local.provenance import describe_machine
from vlm_local.types import Generation

_LARGEST_DIFFERENCE = 1e-4
_PLAIN, _QUANTIZED = ("float32", "bfloat16"), ("8bit", "4bit")  # what is compared of each family
_LIKELY = 1e-3  # of the less likely ones a logarithm says little


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=FAMILIES, help="[all]")
    parser.add_argument("--requests", type=int, default=5, help="of each family and dtype [5]")
    parser.add_argument("--fused", action="store_true", help="with layers that torch.compile has fused")
    parser.add_argument("--quantized", action="store_true", help="8-bit and 4-bit weights in bfloat16, not plain ones")
    args = parser.parse_args()
    if args.quantized and find_spec("bitsandbytes") is None:
        print("left out: bitsandbytes is not installed")
        return 0
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    families: dict[str, Any] = {}
    told = {"requests": args.requests, "fused": args.fused}
    about = {"benchmark": "values", "device": str(device), **told, **describe_machine()}
    if device.type == "cuda":
        about["failed capture"] = fail_a_capture(device)
    for family in args.families:
        torch.compiler.reset()  # what was compiled for one family is only in the way of the next
        compared = {}
        for kind in _QUANTIZED if args.quantized else _PLAIN:
            quantize, dtype = (kind, "bfloat16") if args.quantized else ("none", kind)
            loaded = load_model(open_checkpoint(tiny_checkpoint(family)), quantize, str(device), dtype)
            compared[kind] = compare(loaded, **told)
        families[family] = {**compared, "right": all(is_right(kind, each) for kind, each in compared.items())}
        print(json.dumps({**about, "families": families}), flush=True)  # the next family may take too long
    return 0 if all(each["right"] for each in families.values()) else 1


def fail_a_capture(device: torch.device) -> dict[str, Any]:
    """What is left of a pool of graphs behind a capture that fails, because it reads a value back."""
    pool, numbers = GraphPool(captures=True), torch.ones(4, device=device)
    pool.record(lambda: numbers.sum().item())
    double = pool.record(lambda: 2 * numbers)
    numbers.fill_(3)
    return {"captured": pool.captured, "uncaptured": pool.uncaptured, "doubled": double()[0].item()}


def is_right(kind: str, compared: Mapping[str, float]) -> bool:
    """kind: dtype or quantisation of what was compared."""
    is_exact = compared["disagreements"] == 0 and compared["largest difference"] <= _LARGEST_DIFFERENCE
    is_near = all(count == 0 for name, count in compared.items() if name.endswith("but near ties"))
    return is_near and (is_exact or kind != "float32")


def compare(loaded: LoadedModel, requests: int, fused: bool) -> dict[str, float]:
    """One episode: each step is drafted by what was said before, on kept KV.

    The last step's answer is compared by all its probabilities, which outlines needs many forwards for;
    the others by the phrase.
    """
    processing = Processing(loaded.processor, loaded.family, loaded.dtype)
    is_static = True if loaded.device.type == "cpu" else None  # a GPU chooses as it would when it serves
    decoder, reference = TreeDecoder(loaded, is_static=is_static, is_fused=fused), OutlinesDecoder(loaded)
    mine: list[Generation] = []
    theirs: list[Generation] = []
    for seed in range(requests):
        drafts = tuple(each.sentence for each in mine[::-1])
        posterior = "exact" if seed == requests - 1 else "off"
        request = draw_request(seed, sentences=PHRASES, episode="a", drafts=drafts, posterior=posterior)
        [prepared] = prepare(processing, request)
        mine += decoder.decode([prepared])
        theirs += reference.decode([prepared])
    sentences = [[each.sentence for each in answers] for answers in (mine, theirs)]
    batch = (draw_request(seed, sentences=PHRASES) for seed in range(requests))
    together = decoder.decode(prepare(processing, *batch))
    one, other = mine[-1].probabilities, theirs[-1].probabilities
    likely = other > _LIKELY
    return {
        **count_disagreements(*sentences, [bool(each.stats["near_tie"]) for each in mine]),
        "disagreements in a batch but near ties": sum(
            one.sentence != other.sentence and not one.stats["near_tie"]
            for one, other in zip(together, theirs, strict=True)
        ),
        "largest difference": float(np.abs(one - other).max()),
        "largest difference of logarithms": float(np.abs(np.log(one[likely]) - np.log(other[likely])).max(initial=0.0)),
        **decoder.metadata.get("graphs", {}),
    }


if __name__ == "__main__":
    sys.exit(main())
