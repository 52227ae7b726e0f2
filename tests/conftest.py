"""`--slow`: also the tests that take minutes. `bash tests/run.sh --slow` runs them with the others."""

import gc
import logging
import os

import pytest

# Imports make a million objects that stay: looking through them again and again was a seventh of the collection's time.
gc.disable()

# No test asks a server on the internet. Each HTTP client would load all of the machine's certificates.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")


def pytest_collection_finish():
    gc.set_threshold(20_000)
    # pytest adds its handlers to every logger that does not propagate, three times a test: torch has 87 of them.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch")]:
        logging.getLogger(name).propagate = True
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: --slow runs it"))
