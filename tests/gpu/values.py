"""Does the device say what it should: the tree decoder against outlines, for every family.

float32: phrase for phrase, every probability within 1e-4. bfloat16: phrase for phrase but for near
ties, where the decoder has seen that it could not tell. Exits with 1 where that does not hold.
"""

import argparse
import json
import sys
from dataclasses import replace

import numpy as np
import torch

from tests.decoding.tiny import PHRASES, draw_request, load_tiny, prepare
from tests.tiny_models.names import FAMILIES
from vlm_local.checkup.scores import count_disagreements
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.engines.loading import set_up_device
from vlm_local.engines.processing import Processing
from vlm_local.provenance import describe_machine
from vlm_local.types import Generation

_LARGEST_DIFFERENCE = 1e-4
_LIKELY = 1e-3  # of the less likely ones a logarithm says little


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=FAMILIES, help="[all]")
    parser.add_argument("--requests", type=int, default=5, help="of each family and dtype [5]")
    parser.add_argument("--fused", action="store_true", help="with layers that torch.compile has fused")
    args = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    set_up_device(device)
    families = {}
    told = {"requests": args.requests, "fused": args.fused}
    about = {"benchmark": "values", "device": str(device), **told, **describe_machine()}
    for family in args.families:
        torch.compiler.reset()  # what was compiled for one family is only in the way of the next
        exact, rough = (compare(family, device, dtype, **told) for dtype in (torch.float32, torch.bfloat16))
        is_right = exact["disagreements"] == 0 and exact["largest difference"] <= _LARGEST_DIFFERENCE
        is_right &= all(each[name] == 0 for each in (exact, rough) for name in each if name.endswith("but near ties"))
        families[family] = {"float32": exact, "bfloat16": rough, "right": is_right}
        print(json.dumps({**about, "families": families}), flush=True)  # the next family may take too long
    return 0 if all(each["right"] for each in families.values()) else 1


def compare(family: str, device: torch.device, dtype: torch.dtype, requests: int, fused: bool) -> dict[str, float]:
    """One episode: each step is drafted by what was said before, on kept KV.

    The last step's answer is compared by all its probabilities, which outlines needs many forwards for;
    the others by the phrase.
    """
    loaded, _ = load_tiny(family, dtype=dtype)
    loaded.model.to(device)
    loaded = replace(loaded, device=device)
    processing = Processing(loaded.processor, loaded.family, dtype)
    decoder, reference = TreeDecoder(loaded, is_static=True, is_fused=fused), OutlinesDecoder(loaded)
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
