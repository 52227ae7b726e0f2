"""Molmo2's pictures: cut into patches, some of which are pooled into each token.

Its processor shows a picture of 378x378 pixels or less twice: as a whole, and as the one crop of it, which is the same
pixels. So the vision tower sees it once, and the language model reads what it made of it twice, as it was trained to.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.nn.functional import pad

POOLING = "image_token_pooling"  # what transformers calls the patches of each token


def list_pooled(rows: int, columns: int, height: int, width: int) -> torch.Tensor:
    """int64 (tokens, height * width): the patches of a grid that each token pools, -1 beyond its edge."""
    spare_rows, spare_columns = -rows % height, -columns % width
    edges = (spare_columns // 2, -(-spare_columns // 2), spare_rows // 2, -(-spare_rows // 2))
    places = pad(torch.arange(rows * columns).view(rows, columns), edges, value=-1)
    places = places.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # (rows, height, columns, width)
    return places.transpose(1, 2).reshape(-1, height * width)


def count_on(pooled: Sequence[torch.Tensor]) -> torch.Tensor:
    """Those of several pictures in one forward, whose patches are numbered on and on."""
    starts = accumulate((int(each.max()) + 1 for each in pooled), initial=0)
    return torch.cat([each.where(each < 0, each + start) for each, start in zip(pooled, starts, strict=False)])
