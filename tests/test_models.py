import json
import shutil
from types import SimpleNamespace

import pytest

from tests.tiny_models import tiny_checkpoint
from tests.tiny_models.names import FAMILIES, MIXED
from vlm_local.checkpoint import open_checkpoint
from vlm_local.errors import ConfigError
from vlm_local.files import find_shipped
from vlm_local.models import find_checkpoint, find_local, name_base
from vlm_local.registry import MODELS, find_model


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working folder, an empty Hugging Face cache, nothing in the clone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlm_local.models.find_shipped", lambda name: tmp_path / "shipped")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_registry_holds_every_family_once_by_name():
    names = [name for model in MODELS for name in (model.name, model.alias) if name]
    assert len(set(names)) == len(names)
    assert {model.family for model in MODELS} == {*FAMILIES} - {"smolvlm", *MIXED}  # the first by repository or folder
    assert {f"{model.family}-moe" for model in MODELS if model.is_mixture} == {*MIXED}
    assert {"qwen2-vl", "qwen2-vl-7b", "qwen2.5-vl", "qwen3-vl", "paligemma", "paligemma2", "smolvlm2"} <= set(names)
    assert find_model("Qwen/Qwen2-VL-2B-Instruct") is find_model("qwen2-vl-2b") is find_model("qwen2-vl")
    for model in MODELS[1:]:
        memory = [model.estimate_memory(kind) for kind in model.quantizations]
        assert memory == sorted(memory, reverse=True) and model.download_bytes >= memory[0]


def test_a_folder_is_taken_as_given_and_by_name(workplace):
    folder = tiny_checkpoint("qwen2-vl")
    assert find_checkpoint(str(folder)).folder == folder
    placed = shutil.copytree(folder, workplace / "checkpoints" / "qwen2-vl")
    for name in ("qwen2-vl", "qwen2-vl-2b", "Qwen/Qwen2-VL-2B-Instruct", "checkpoints/qwen2-vl"):
        assert find_checkpoint(name).folder.resolve() == placed
    shutil.copytree(folder, workplace / "mine")
    assert find_checkpoint("mine").folder.resolve() == workplace / "mine"
    assert find_local("paligemma") is None


def test_the_embedded_checkpoint_is_found_from_anywhere(monkeypatch):
    monkeypatch.setattr("vlm_local.models.find_shipped", find_shipped)
    assert find_checkpoint("tiny", offline=True).family == "qwen2-vl"


def _fill_cache(workplace, repository):
    """Folder of a snapshot in the cache, not there yet."""
    commit, folder = "0" * 40, workplace / "cache" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots").mkdir()
    return folder / "snapshots" / commit


def test_the_cache_comes_before_the_hub(workplace, monkeypatch):
    folder = _fill_cache(workplace, "Qwen/Qwen2-VL-2B-Instruct")
    shutil.copytree(tiny_checkpoint("qwen2-vl"), folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_checkpoint("qwen2-vl").folder == folder
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match="not on this machine"):  # the rest would have to be downloaded
        find_checkpoint("qwen2-vl")
    (folder / "config.json").write_text('{"model_type": "gemma3n"}')
    with pytest.raises(ConfigError, match="says model_type 'gemma3n'"):
        find_checkpoint("qwen2-vl")


def test_an_adapter_in_the_cache_needs_no_hub(workplace):
    folder = _fill_cache(workplace, "lab/adapter")
    _write_adapter(folder, str(tiny_checkpoint("qwen2-vl")))
    assert find_checkpoint("lab/adapter", offline=True).adapter == folder


@pytest.mark.parametrize("how", ["flag", "environment", "unreachable"])
def test_a_missing_model_is_told_at_once_with_the_command_that_gets_it(how, workplace, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = []
    if how == "unreachable":
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: _cannot_connect(asked))
    with pytest.raises(ConfigError) as caught:
        find_checkpoint("qwen2-vl", offline=how == "flag")
    assert len(asked) == (how == "unreachable")  # not again and again
    text = str(caught.value)
    assert "\n" not in text and "licence" not in text
    for part in (str(workplace / "checkpoints" / "qwen2-vl"), "fetch qwen2-vl", "4.4 GB", str(workplace / "cache")):
        assert part in text


def _cannot_connect(asked):
    asked.append(True)
    raise ConnectionError("no route to host")


def test_a_gated_model_names_the_licence_step():
    with pytest.raises(ConfigError, match=r"licence at https://huggingface.co/google/paligemma2.*`hf auth login`"):
        find_checkpoint("paligemma2", offline=True)


@pytest.mark.parametrize("name", ["qwen9", "a/b/c", "/nowhere/at/all", "./nothing"])
def test_what_cannot_be_a_model_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)
    with pytest.raises(ConfigError, match="there is no"):
        find_checkpoint(name)


def test_a_download_that_does_not_fit_the_disk_is_not_begun(monkeypatch):
    files = [SimpleNamespace(rfilename="model.safetensors", size=10**18)]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=files, sha=""))
    with pytest.raises(ConfigError, match="GB left"):
        find_checkpoint("qwen2-vl")


def test_an_adapter_brings_its_base(workplace):
    shutil.copytree(tiny_checkpoint("qwen2-vl"), workplace / "checkpoints" / "qwen2-vl")
    adapter = workplace / "mine"
    adapter.mkdir()
    (adapter / "vlm_local.json").write_text('{"trained": true}')
    shutil.copy(tiny_checkpoint("qwen2-vl") / "model.safetensors", adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}))
    checkpoint = find_checkpoint("./mine")
    assert checkpoint.folder.resolve() == workplace / "checkpoints" / "qwen2-vl"
    assert checkpoint.adapter.resolve() == adapter and checkpoint.sidecar == {"trained": True}
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="base model"):
        find_checkpoint("./mine")


def _write_adapter(folder, base):
    folder.mkdir(exist_ok=True)
    shutil.copy(tiny_checkpoint("qwen2-vl") / "model.safetensors", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (None, "base_model_name_or_path is null; expected the folder, name or hub repository"),
        ("", 'is ""; expected'),
        (5, "is 5; expected"),
        ([], r"is \[\]; expected"),
        (".", "which is this adapter itself"),
        ("../mine", "which is this adapter itself"),
        ("../other", "which is another adapter"),
        ("qwen9", r"adapter_config\.json: base_model_name_or_path is 'qwen9': there is no model"),
        ("/nowhere/model", r"adapter_config\.json: base_model_name_or_path is '/nowhere/model': there is no folder"),
        ("~nosuchuser/model", r"is '~nosuchuser/model': there is no folder"),
        (300 * "x", r"adapter_config\.json: base_model_name_or_path is 'xxx.*File name too long"),
    ],
)
def test_an_adapter_whose_base_is_no_model_is_refused(base, reason, workplace):
    _write_adapter(workplace / "mine", base)
    _write_adapter(workplace / "other", "../mine")
    with pytest.raises(ConfigError, match=reason):
        find_checkpoint("./mine")


def test_an_adapter_is_served_on_the_weights_that_it_was_trained_on_alone(workplace):
    """Where a training wrote down which: same shapes of other weights would answer nonsense without a word."""
    base = shutil.copytree(tiny_checkpoint("qwen2-vl"), workplace / "base")
    _write_adapter(workplace / "mine", "../base")
    told = {"training": {"base_sha256": open_checkpoint(base).sha256}}
    (workplace / "mine" / "vlm_local.json").write_text(json.dumps(told))
    assert find_checkpoint("./mine").sidecar == told
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=r"trained on weights with the sha256 \w{12}\.\.\., but those of its base"):
        find_checkpoint("./mine")
    for told in ({"training": {}}, {"training": None}, {}):
        (workplace / "mine" / "vlm_local.json").write_text(json.dumps(told))
        assert find_checkpoint("./mine").sidecar == told


def test_a_base_in_the_cache_of_somebody_else_is_found_by_its_repository(workplace):
    shutil.copytree(tiny_checkpoint("qwen2-vl"), workplace / "checkpoints" / "qwen2-vl")
    snapshot = f"models--Qwen--Qwen2-VL-2B-Instruct/snapshots/{'0' * 40}"
    for base in (f"/home/somebody/.cache/huggingface/hub/{snapshot}", f"D:\\hub\\{snapshot}\\".replace("/", "\\")):
        _write_adapter(workplace / "mine", base)
        assert find_checkpoint("./mine").folder.resolve() == workplace / "checkpoints" / "qwen2-vl"


def test_an_adapter_names_its_base_as_other_machines_know_it(workplace):
    """Its repository, not the folder of the cache; a folder that stands for itself is named as it is."""
    commit = "0" * 40
    repository = workplace / "cache" / "models--Qwen--Qwen2-VL-2B-Instruct"
    shutil.copytree(tiny_checkpoint("qwen2-vl"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("qwen2-vl", str(repository / "snapshots" / commit)):
        assert name_base(find_checkpoint(name)) == "Qwen/Qwen2-VL-2B-Instruct"
    shutil.copytree(tiny_checkpoint("qwen2-vl"), workplace / "checkpoints" / "tiny")
    assert name_base(find_checkpoint("tiny")) == "tiny"
    shutil.copytree(tiny_checkpoint("qwen2-vl"), workplace / "tiny")
    assert name_base(find_checkpoint("./tiny")) == str(workplace / "tiny")
    assert name_base(open_checkpoint(workplace / "tiny")) == str(workplace / "tiny")
