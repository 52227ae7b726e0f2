import pytest

from tests.engines.fake_server import FakeServer


@pytest.fixture
def open_engine():
    from vlm_local.engines.openai import OpenAIEngine

    engines = []

    def open_(*servers, **options):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        engines.append(OpenAIEngine(urls, "tiny", **options))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


@pytest.fixture
def server():
    with FakeServer() as fake:
        yield fake
