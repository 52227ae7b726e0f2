"""Parameters of a test that wait for --slow: more seeds, families and kinds, which the same code answers."""

import pytest


def slow(*values):
    """The parameters of one case, which runs with --slow only."""
    return pytest.param(*values, marks=pytest.mark.slow)
