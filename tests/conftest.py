"""Which tests run: the fast ones, with `--slow` those that the CI runs too, with `--long` all."""

import gc
import logging
import os
import shutil

import pytest

# Imports make a million objects that stay: looking through them again and again was a seventh of the collection's time.
gc.disable()

# No test asks a server on the internet. Each HTTP client would load all of the machine's certificates.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)


# Marker and option -> what it is about. Each option also runs the tests of those before it.
_KINDS = {
    "slow": "takes over a second, or is a further case of its kind",
    "long": "takes long: soaks, killed trainings, every command of the documents",
}


@pytest.fixture
def folder(tmp_path):
    """A copy of the small Qwen2-VL's, which a test may change."""
    from tests.tiny_models import tiny_checkpoint  # loads torch, which tests of a part may not need

    return shutil.copytree(tiny_checkpoint("qwen2-vl"), tmp_path / "model")


def pytest_addoption(parser):
    for kind, about in _KINDS.items():
        parser.addoption(f"--{kind}", action="store_true", help=f"also run each test that {about}")


def pytest_configure(config):
    for kind, about in _KINDS.items():
        config.addinivalue_line("markers", f"{kind}: {about}; --{kind} runs it")
    config.option.slow = config.option.slow or config.option.long


def pytest_collection_finish():
    gc.set_threshold(20_000)
    # pytest adds its handlers to every logger that does not propagate, three times a test: torch has 87 of them.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch")]:
        logging.getLogger(name).propagate = True
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config, items):
    for kind in _KINDS:
        if not config.getoption(f"--{kind}"):
            for item in items:
                if item.get_closest_marker(kind):
                    item.add_marker(pytest.mark.skip(reason=f"{_KINDS[kind]}: --{kind} runs it"))
