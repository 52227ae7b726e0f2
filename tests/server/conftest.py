import pytest

from tests.server.door import open_door


@pytest.fixture(scope="module")
def door():
    with open_door() as opened:
        yield opened
