"""Errors cross the pipe of the engine's process."""

import pickle

import pytest

from vlm_local import errors
from vlm_local.client import PolicyError
from vlm_local.errors import EngineClosed

CASES = [
    errors.RequestError("too narrow", 422),
    errors.RemoteError("no answer", "timeout"),
    PolicyError("refused", 403),
    *(
        kind("what happened")
        for kind in (errors.ConfigError, errors.GrammarError, errors.DataError, errors.EngineError, EngineClosed)
    ),
]


@pytest.mark.parametrize("error", CASES, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_on_the_other_side(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
