import pytest

from tests.training.tuning import PROMPT, record
from vlm_local.prompts import load_template
from vlm_local.training.samples import RecordedSamples


@pytest.fixture
def samples():
    """White goes forward, black goes up."""
    return RecordedSamples([record(0, 0, 255), record(1, 2, 0)], load_template(PROMPT), 0, seed=0)
