"""Where the data that ships with the code lies: beside it in a clone, inside it once installed."""

from pathlib import Path

from vlm_local.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def find_shipped(name: str) -> Path:
    """Folder of shipped data, "grammars" or "checkpoints"."""
    for folder in (_PACKAGE / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the folder {name!r} is neither in {_PACKAGE} nor beside it; install the package again")
