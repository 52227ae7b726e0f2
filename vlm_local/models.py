"""The registry of models by name, and where a checkpoint is found: folders, cache, hub. No torch."""

import json
import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_local.checkpoint import FILES, Checkpoint, check_processor_files, open_checkpoint, read_kind
from vlm_local.errors import ConfigError, suggest
from vlm_local.files import find_shipped, measure_free_disk, read_json_object
from vlm_local.weights import ADAPTER, CONFIG, check_weights, estimate_memory, explain_missing

DEFAULT = "tiny"

_HUB_TIMEOUT_S = 5.0
# Not checkpoints and exports in folders, nor the same weights once more in Mistral's own format.
_WANTED: Any = {"allow_patterns": [*FILES], "ignore_patterns": ["*/*", "consolidated*.safetensors"]}
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_ADDRESS = re.compile(r"^https?\b|://|:\d+(/|$)", re.IGNORECASE)  # of a server or the hub
_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")


@dataclass(frozen=True)
class Model:
    """A model of the registry.

    repository: on the Hugging Face hub; None for the one that ships with the project.
    linear, rest: weights in linear layers and elsewhere, counted on the architecture.
    unread: weights for sounds, which are in the repository's files alone.
    stored_bytes: bytes a weight in the repository's files.
    gated: the licence must be accepted on the hub first.
    is_mixture: of experts, which --quantize does not pack; `linear` has those of a token.
    """

    name: str
    repository: str | None
    family: str
    linear: int = 0
    rest: int = 0
    stored_bytes: int = 2
    gated: bool = False
    alias: str | None = None
    unread: int = 0
    is_mixture: bool = False

    @property
    def quantizations(self) -> tuple[str, ...]:
        """What --quantize takes."""
        return ("none",) if self.is_mixture else ("none", "8bit", "4bit")

    @property
    def download_bytes(self) -> int:
        return self.stored_bytes * (self.linear + self.rest + self.unread)

    def estimate_memory(self, quantize: str) -> int:
        """Bytes of its weights with bfloat16 floats."""
        return estimate_memory(self.linear, self.rest, quantize)


MODELS = (
    Model("tiny", None, "qwen2-vl"),
    Model("qwen2-vl", "Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl", 1_973_420_032, 235_565_568, alias="qwen2-vl-2b"),
    Model("qwen2-vl-7b", "Qwen/Qwen2-VL-7B-Instruct", "qwen2-vl", 7_198_998_528, 1_092_377_088),
    Model("qwen2.5-vl", "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl", 3_441_197_056, 313_425_920, alias="qwen2.5-vl-3b"),
    Model("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl", 7_199_817_728, 1_092_348_928),
    Model("qwen3-vl", "Qwen/Qwen3-VL-2B-Instruct", "qwen3-vl", 1_811_939_328, 315_592_704, alias="qwen3-vl-2b"),
    Model("qwen3-vl-4b", "Qwen/Qwen3-VL-4B-Instruct", "qwen3-vl", 4_044_357_632, 393_458_176),
    Model("qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl", 7_517_270_016, 1_249_853_680),
    Model(
        *("qwen3-vl-30b-a3b", "Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3-vl", 3_251_662_848, 27_819_091_184),
        is_mixture=True,
    ),
    Model("qwen3.5", "Qwen/Qwen3.5-4B", "qwen3.5", 3_898_343_424, 640_922_112, alias="qwen3.5-4b"),
    Model("qwen3.5-0.8b", "Qwen/Qwen3.5-0.8B", "qwen3.5", 595_132_416, 257_853_504),
    Model("qwen3.5-2b", "Qwen/Qwen3.5-2B", "qwen3.5", 1_699_872_768, 513_368_896),
    Model("qwen3.5-9b", "Qwen/Qwen3.5-9B", "qwen3.5", 7_369_682_944, 2_040_130_800),
    Model("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", "qwen3.5", 2_857_480_192, 32_249_701_744, is_mixture=True),
    Model("cosmos-reason1-7b", "nvidia/Cosmos-Reason1-7B", "qwen2.5-vl", 7_199_817_728, 1_092_348_928),
    # Its file holds the head, which is the table of tokens, a second time.
    Model("cosmos-reason2-2b", "nvidia/Cosmos-Reason2-2B", "qwen3-vl", 1_811_939_328, 626_757_632, gated=True),
    Model("cosmos-reason2-8b", "nvidia/Cosmos-Reason2-8B", "qwen3-vl", 7_517_270_016, 1_249_853_680, gated=True),
    Model("paligemma", "google/paligemma-3b-mix-224", "paligemma", 2_395_238_400, 528_228_080, 4, True),
    Model("paligemma2", "google/paligemma2-3b-mix-224", "paligemma2", 2_438_000_640, 594_241_776, 2, True),
    Model("gemma3", "google/gemma-3-4b-it", "gemma3", 3_622_662_144, 677_417_328, gated=True, alias="gemma3-4b"),
    Model("gemma3-12b", "google/gemma-3-12b-it", "gemma3", 11_173_883_904, 1_013_441_136, gated=True),
    Model(
        *("gemma4", "google/gemma-4-E2B-it", "gemma4", 2_027_814_912, 2_769_298_688),
        alias="gemma4-e2b",
        unread=307_183_904,
    ),
    Model("gemma4-e4b", "google/gemma-4-E4B-it", "gemma4", 4_123_787_264, 3_508_556_800, unread=308_756_768),
    Model("gemma4-31b", "google/gemma-4-31B-it", "gemma4", 29_831_669_760, 1_441_416_752),
    Model(
        *("glm4.6v-flash", "zai-org/GLM-4.6V-Flash", "glm4v", 9_022_472_192, 1_270_305_280),
        alias="glm-4.6v-flash",
    ),
    Model("lfm2.5-vl", "LiquidAI/LFM2.5-VL-1.6B", "lfm2-vl", 1_460_695_040, 135_930_864, alias="lfm2.5-vl-1.6b"),
    Model("lfm2.5-vl-450m", "LiquidAI/LFM2.5-VL-450M", "lfm2-vl", 380_633_088, 68_085_760),
    Model("lfm2-vl-450m", "LiquidAI/LFM2-VL-450M", "lfm2-vl", 382_730_240, 68_092_416),
    Model("internvl3", "OpenGVLab/InternVL3-2B-hf", "internvl", 1_620_836_352, 468_121_088, alias="internvl3-2b"),
    Model("internvl3-1b", "OpenGVLab/InternVL3-1B-hf", "internvl", 664_289_280, 273_903_744),
    Model("internvl3-8b", "OpenGVLab/InternVL3-8B-hf", "internvl", 6_854_803_456, 1_089_570_304),
    # Its file holds the head, which is the table of tokens, a second time.
    Model(
        *("ministral3", "mistralai/Ministral-3-3B-Instruct-2512-BF16", "mistral3", 3_445_620_736, 806_122_496),
        alias="ministral3-3b",
    ),
    Model("ministral3-8b", "mistralai/Ministral-3-8B-Instruct-2512-BF16", "mistral3", 7_843_348_480, 1_074_677_760),
    Model("ministral3-14b", "mistralai/Ministral-3-14B-Instruct-2512-BF16", "mistral3", 12_601_786_368, 1_343_245_312),
    Model(
        *("mistral-small3.1", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral3"),
        *(22_668_115_968, 1_343_245_312),
    ),
    Model("molmo2", "allenai/Molmo2-4B", "molmo2", 4_071_220_736, 779_648_464, 4, alias="molmo2-4b"),
    Model("molmo2-8b", "allenai/Molmo2-8B", "molmo2", 7_414_998_528, 1_246_704_592, 4),
    Model("molmo2-o-7b", "allenai/Molmo2-O-7B", "molmo2", 6_937_044_480, 823_742_416, 4),
    Model(
        *("smolvlm2", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm2", 2_042_916_864, 203_868_016, 4),
        alias="smolvlm2-2.2b",
    ),
    Model("smolvlm2-500m", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "smolvlm2", 411_303_936, 96_178_368, 4),
    Model("smolvlm2-256m", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "smolvlm2", 198_180_864, 58_304_064, 4),
)


def find_model(name: str) -> Model | None:
    """Registry entry by name, alias or repository id."""
    return next((model for model in MODELS if name in (model.name, model.alias, model.repository)), None)


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
