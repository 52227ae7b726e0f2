"""Where the checkpoint of a name is found: folders, cache, hub. No torch."""

import json
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlm_local.checkpoint import FILES, Checkpoint, check_processor_files, open_checkpoint, read_kind
from vlm_local.errors import ConfigError, suggest
from vlm_local.files import find_shipped, measure_free_disk, read_json_object
from vlm_local.registry import MODELS, find_model
from vlm_local.weights import ADAPTER, CONFIG, check_weights, explain_missing

_HUB_TIMEOUT_S = 5.0
# Not checkpoints and exports in folders, nor the same weights once more in Mistral's own format.
_WANTED: Any = {"allow_patterns": [*FILES], "ignore_patterns": ["*/*", "consolidated*.safetensors"]}
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_ADDRESS = re.compile(r"^https?\b|://|:\d+(/|$)", re.IGNORECASE)  # of a server or the hub
_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")


def find_checkpoint(name: str, offline: bool = False) -> Checkpoint:
    """The checkpoint that `--model NAME` means: a folder, a registry name or a repository id.

    Order: a folder as given; checkpoints/NAME of the working folder, then of the clone or package;
    the Hugging Face cache; the hub, where `offline` (or HF_HUB_OFFLINE=1) does not forbid it. A LoRA
    adapter's folder brings its base through the same door. Raises ConfigError in one paragraph.
    """
    folder = find_local(name) or _download(name, offline)
    if not (folder / ADAPTER).is_file():
        return open_checkpoint(folder, name)
    return open_checkpoint(_find_base(folder, offline), name, adapter=folder)


def find_local(name: str) -> Path | None:
    """Folder of a checkpoint that is on this machine already, or None."""
    given = Path(os.path.expanduser(name))  # a user's home that is unknown stays as it is
    if given.is_dir() and (_is_path(name) or _holds_model(given)):
        return given
    return next((folder for folder in _list_folders(name) if _holds_model(folder)), None) or _find_cached(name)


def fetch(name: str, offline: bool = False) -> Path:
    """Make sure that a model is on this machine; its folder."""
    return find_checkpoint(name, offline).folder


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.endswith(os.sep)


def _holds_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / ADAPTER).is_file()


def _list_folders(name: str) -> list[Path]:
    """checkpoints/NAME of the working folder, then of the clone or package."""
    model = find_model(name)
    names: list[str] = list(dict.fromkeys([name, *([model.name] if model else [])]))
    roots = dict.fromkeys([Path("checkpoints").absolute(), find_shipped("checkpoints")])
    return [root / each for root in roots for each in names if not os.path.isabs(each)]


def _find_repository(name: str) -> str | None:
    model = find_model(name)
    if model:
        return model.repository
    return name if _REPOSITORY.fullmatch(name) and not _is_path(name) else None


def _find_cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository = _find_repository(name)
    if repository is None:
        return None
    try:
        folder = Path(snapshot_download(repository, local_files_only=True, **_WANTED))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    is_adapter = (folder / ADAPTER).is_file()
    if not is_adapter and (folder / CONFIG).is_file():
        read_kind(folder)  # what the hub has more of it would not make it a known model
    try:
        check_weights(folder, None) if is_adapter else open_checkpoint(folder)
    except ConfigError:
        return None  # a download that was broken off: the hub goes on with it
    return folder


def name_base(checkpoint: Checkpoint) -> str:
    """What an adapter that is trained on a model calls it: its repository or registry name, else its folder.

    Never a folder of the cache, which another machine does not have.
    """
    if cached := _SNAPSHOT.search(str(checkpoint.folder)):
        return f"{cached[1]}/{cached[2]}"
    model, folder = find_model(checkpoint.name), checkpoint.folder.resolve()
    if model is not None and folder in [each.resolve() for each in _list_folders(checkpoint.name)]:
        return model.repository or model.name
    return str(folder)


def _find_base(adapter: Path, offline: bool) -> Path:
    """Folder of the whole model that an adapter's config names."""
    file, key = adapter / ADAPTER, "base_model_name_or_path"
    try:
        base = read_json_object(file)[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} does not name its base model: {error!r}") from None
    expected = "expected the folder, name or hub repository of a whole model"
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(f"{file}: {key} is {json.dumps(base)[:100]}; {expected}")
    try:
        folder = _locate_base(adapter, base, offline)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{file}: {key} is {base!r}: {error}") from None
    if (folder / ADAPTER).is_file():
        kind = "this adapter itself" if folder.resolve() == adapter.resolve() else "another adapter"
        raise ConfigError(f"{file}: {key} is {base!r}, which is {kind} ({folder}); {expected}")
    return folder


def _locate_base(adapter: Path, base: str, offline: bool) -> Path:
    if (adapter / base).is_dir():
        return adapter / base
    if cached := _SNAPSHOT.search(base):  # somebody else's cache
        base = f"{cached[1]}/{cached[2]}"
    return find_local(base) or _download(base, offline)


def _download(name: str, offline: bool) -> Path:
    repository = _find_repository(name)
    if repository is None:
        raise ConfigError(_explain_unknown(name))
    if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ConfigError(_explain_missing(name, repository, "downloads are forbidden (--offline or HF_HUB_OFFLINE)"))
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        info = HfApi().model_info(repository, files_metadata=True, timeout=_HUB_TIMEOUT_S)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = _choose_files(repository, sizes)
        size = sum(sizes[file] for file in wanted)
        _check_disk(Path(HF_HUB_CACHE), size, name)
        if ADAPTER not in wanted:  # before gigabytes of a model that is not understood
            read_kind(Path(snapshot_download(repository, allow_patterns=[CONFIG])))
            check_processor_files(repository, wanted)
        print(f"Downloading {repository} ({size / 1e9:.1f} GB) to {HF_HUB_CACHE} ...", file=sys.stderr, flush=True)
        return Path(snapshot_download(repository, **_WANTED))  # by branch: the cache is looked up by it
    except ConfigError:
        raise
    except Exception as error:  # huggingface_hub has changed its HTTP library, and so its errors, twice
        reason = f"the hub (https://huggingface.co) does not give it: {type(error).__name__}: {error}".split("\n")[0]
        raise ConfigError(_explain_missing(name, repository, reason)) from error


def _choose_files(repository: str, names: Collection[str]) -> list[str]:
    """Those of a repository that a model consists of. Raises ConfigError where they are none."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = list(filter_repo_objects(names, **_WANTED))
    inner = sorted({os.path.dirname(name) for name in names if os.path.basename(name) in (CONFIG, ADAPTER)})
    if inner and "" not in inner:
        raise ConfigError(
            f"{repository} has no {CONFIG}, but folders that have one or an adapter ({', '.join(inner[:5])}): get one "
            f"by `hf download {repository} --include '{inner[0]}/*' --local-dir NAME` and give NAME/{inner[0]}"
        )
    if not any(name.endswith(".safetensors") for name in wanted):
        raise ConfigError(f"{repository} lacks weights; {explain_missing(name.split('/')[0] for name in names)}")
    return wanted


def _check_disk(cache: Path, size: int, name: str) -> None:
    free = measure_free_disk(cache)
    if free < size:
        raise ConfigError(
            f"{name} takes {size / 1e9:.1f} GB, but {cache} has {free / 1e9:.1f} GB left; "
            "make room, or name another folder in the environment variable HF_HOME"
        )


def _explain_unknown(name: str) -> str:
    if _ADDRESS.search(name):
        return (
            f"{name!r} names no model: a repository of the hub is org/name, and the address of a policy server such as "
            "http://127.0.0.1:8000"
        )
    if Path(os.path.expanduser(name)).is_file():
        return f"{name} is a file; expected the folder of a model, with its {CONFIG}"
    if _is_path(name):
        return f"there is no folder {name}"
    if name.lower() == "oracle":
        return f"{name!r} names no model: the oracle reads a simulator's state, as `sim --policy oracle` has it"
    names = [model.name for model in MODELS]
    nearest = suggest(name, [*names, "random", "stop"])
    return (
        f"there is no model {name!r}{nearest or ':'} give one of {', '.join(names)}; a folder; or a repository of the "
        "hub (org/name)"
    )


def _explain_missing(name: str, repository: str, reason: str) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    model = find_model(name)
    size = f" ({model.download_bytes / 1e9:.1f} GB)" if model else ""
    gate = (
        f" Before that, accept its licence at https://huggingface.co/{repository} and log in with `hf auth login`."
        if (model and model.gated) or "GatedRepo" in reason
        else ""
    )
    looked = ", ".join(str(folder) for folder in _list_folders(name))
    return (
        f"{name} is not on this machine: there is no model in {looked}, nor {repository} in the Hugging Face cache "
        f"{HF_HUB_CACHE}, and {reason}. Where there is internet, `.venv/bin/python -m vlm_local fetch {name}` gets "
        f"it{size}; a copy of the folder that it prints (cp -rL) may also lie in "
        f"checkpoints/{model.name if model else name}.{gate}"
    )
