"""Data sets on the Hugging Face hub, by name: lerobot:ORG/NAME."""

import os
import re
import sys
from pathlib import Path

from vlm_local.errors import ConfigError

_NAME = re.compile(r"lerobot:([\w.-]+/[\w.-]+)")


def parse_repository(path: str | Path) -> str | None:
    """ "lerobot:ORG/NAME" -> "ORG/NAME"; None for what is a path."""
    match = _NAME.fullmatch(str(path))
    return match[1] if match else None


def download_data_set(repository: str) -> Path:
    """Folder of a data set in the hub's cache, downloaded where it is not there. Raises ConfigError where it cannot be.

    A download that was broken off goes on. Reads HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and HF_HOME as all of the hub's
    programs do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "TRUE", "YES", "ON"):
        print(f"lerobot:{repository}: read from the hub, at first downloaded", file=sys.stderr, flush=True)
    try:
        return Path(snapshot_download(repository, repo_type="dataset"))
    except LocalEntryNotFoundError:
        reason = "there is no connection to the hub (or HF_HUB_OFFLINE is set), and nothing of it in the cache"
    except Exception as error:  # huggingface_hub has changed its HTTP library, and so its errors, twice
        reason = f"the hub does not give it: {type(error).__name__}: {error}".split("\n")[0]
    raise ConfigError(
        f"lerobot:{repository} cannot be read: {reason}; download it elsewhere (hf download {repository} --repo-type "
        "dataset --local-dir FOLDER) and give the folder"
    )
