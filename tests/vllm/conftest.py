"""A real vLLM, started from a virtual environment of its own: bash tests/run.sh --vllm."""

import os

import pytest

from tests.vllm.checkpoint import write_served_checkpoint
from tests.vllm.server import VLLM

PYTHON = os.environ.get("VLM_LOCAL_VLLM_PYTHON")

if PYTHON is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_served_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def vllm(checkpoint, tmp_path_factory):
    """A server that no test harms."""
    with VLLM(PYTHON, checkpoint, tmp_path_factory.mktemp("vllm") / "log") as server:
        server.wait_ready()
        yield server


@pytest.fixture
def start_vllm(checkpoint, tmp_path):
    """Servers that a test may kill."""
    servers = []

    def start():
        servers.append(VLLM(PYTHON, checkpoint, tmp_path / f"log-{len(servers)}"))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
