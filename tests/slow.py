"""Parameters of a test that wait for --slow: more seeds, families and kinds, which the same code answers."""

import pytest


def slow(*values):
    """The parameters of one case, which runs with --slow only."""
    return pytest.param(*values, marks=pytest.mark.slow)


# For tests of what families share: by default one of each architecture that the code tells apart.
FAMILIES = ["qwen2-vl", "qwen3-vl", "paligemma2", "smolvlm2", slow("qwen2.5-vl"), slow("paligemma"), slow("smolvlm")]
