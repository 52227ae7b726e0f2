"""Parameters of a test that wait for --slow: more seeds, families and kinds, which the same code answers."""

import pytest

from tests.tiny_models.names import GEMMA4, MISTRAL, MIXED, MOLMO2


def slow(*values):
    """The parameters of one case, which runs with --slow only."""
    return pytest.param(*values, marks=pytest.mark.slow)


# For tests of what families share: by default a chat model and one whose prompt's tokens all see each other.
FAMILIES = [
    "qwen2-vl",
    "paligemma2",
    *map(slow, ("qwen3-vl", "smolvlm2", "qwen2.5-vl", "qwen3.5", "paligemma", "gemma3", "internvl", "smolvlm", *MIXED)),
    *map(slow, ("glm4v", "lfm2-vl", *GEMMA4, *MISTRAL, *MOLMO2)),
]
