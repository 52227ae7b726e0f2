"""Fine-tuning of every kind of family: what was learnt is what the served model says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests import recordings
from tests.decoding.tiny import share_tiny
from tests.slow import FAMILIES
from tests.tiny_models import tiny_checkpoint
from tests.tiny_models.names import MIXED
from tests.training.tuning import PROMPT, ask, record, record_another, tune
from vlm_local.cli import main
from vlm_local.embodiments import find_file
from vlm_local.errors import ConfigError, DataError
from vlm_local.policy_options import PolicyOptions
from vlm_local.prompts import load_template
from vlm_local.resolved_options import ResolvedOptions
from vlm_local.training.samples import RecordedSamples
from vlm_local.types import Episode


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "qwen2-vl",
        "paligemma",
        "smolvlm2",
        "gemma3",
        "gemma4",
        "glm4v",
        "internvl",
        "lfm2-vl",
        "mistral3",
        "molmo2",
        "qwen3.5",
        *MIXED,
    ],
)
def test_the_tuned_model_says_what_it_learnt(family, samples, tmp_path):
    tune(tiny_checkpoint(family), tmp_path, samples, save_every=40)
    assert (ask(tmp_path, 255), ask(tmp_path, 0)) == ("move forward", "move up")


@pytest.mark.slow
def test_adapters_are_a_folder_that_brings_its_base(samples, tmp_path):
    base = tiny_checkpoint("qwen2-vl")
    tune(base, tmp_path, samples, num_steps=50, lora=16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert json.loads((tmp_path / "vlm_local.json").read_text())["training"]["skipped_steps"] == 0
    assert not (tmp_path / "model.safetensors").exists()
    assert (ask(tmp_path, 255), ask(tmp_path, 0)) == ("move forward", "move up")


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_on_every_linear_layer_of_the_language_model(family, samples, tmp_path, recwarn):
    tune(tiny_checkpoint(family), tmp_path, samples, num_steps=1, lora=2)
    loaded, _ = share_tiny(family)
    kinds = {name for name, module in loaded.model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name for name in kinds if "language_model" in name or "text_model" in name}
    wanted = {name for name in wanted if "router" not in name}  # who works stays as it was learnt
    wanted = {name for name in wanted if not name.endswith("shared_expert_gate")}  # one number for each token
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in stored}
    assert adapted == wanted and len(stored) == 2 * len(wanted)
    assert not [each for each in recwarn if each.category is FutureWarning]  # of libraries among themselves


@pytest.mark.slow
def test_a_detectors_adapters_are_within_the_layers_that_clip(samples, tmp_path):
    tune(tiny_checkpoint("gemma4"), tmp_path, samples, num_steps=1, lora=2, adapts_vision=True)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names}
    modules = share_tiny("gemma4")[0].model.named_modules()
    tower = {name for name, module in modules if "vision_tower.encoder" in name and type(module) is torch.nn.Linear}
    assert {name for name in adapted if "vision_tower" in name} == tower
    assert ask(tmp_path, 255)


def test_a_tuned_folder_has_the_prompt_and_the_log_of_its_own_training(samples, tmp_path):
    """And nothing that was trained or recorded in the folder of its base."""
    base, prompt, out = tmp_path / "base", tmp_path / "mine.txt", tmp_path / "out"
    shutil.copytree(tiny_checkpoint("qwen2-vl"), base)
    for name in (
        "prompt.txt",
        "training/log.jsonl",
        "training/state.pt",
        "checkpoint-500/config.json",
        "optimizer.bin",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("the base's")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "other.jinja").write_text("of several")
    (base / "chat_template.json").rename(base / "unused.json")
    (base / "chat_template.jinja").write_text(json.loads((base / "unused.json").read_text())["chat_template"])
    prompt.write_text("[before]\nMine: $instruction\n[after]\nGo.\n")
    tune(base, out, samples, num_steps=2, prompt=prompt)
    assert json.loads((out / "vlm_local.json").read_text())["prompt"] == "prompt.txt"
    assert (out / "prompt.txt").read_text() == prompt.read_text()
    assert (out / "additional_chat_templates" / "other.jinja").exists()
    assert not (out / "checkpoint-500").exists() and not (out / "optimizer.bin").exists()
    tune(base, out, samples, num_steps=2, prompt=prompt)  # its own settings: the same command goes on


def test_adapters_are_written_without_a_look_at_the_hub(samples, tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr("vlm_local.training.finetune.name_base", lambda checkpoint: "lab/model")
    tune(tiny_checkpoint("qwen2-vl"), tmp_path, samples, num_steps=1, lora=2)
    assert not [each for each in recwarn if "config" in str(each.message)]


def test_a_quantised_model_is_not_trained(samples, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen2-vl"), tmp_path / "stored")
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["packed"] = torch.zeros(2, dtype=torch.uint8)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"quantised \(bitsandbytes-4bit\).*unquantised folder"):
        tune(folder, tmp_path / "out", samples, num_steps=2)


def test_samples_are_the_labels_of_the_steps(samples):
    epoch = samples.draw(0, len(samples))
    assert len(samples) == 6  # three full windows of each
    assert sorted(sample.phrase for sample in epoch) == ["move forward"] * 3 + ["move up"] * 3
    assert all((sample.image.max() == 255) == (sample.phrase == "move forward") for sample in epoch)
    halves = samples.draw(0, 3) + samples.draw(1, 3)  # an epoch is the same however it is cut
    assert [sample.prompt for sample in halves] == [sample.prompt for sample in epoch]


def test_a_frame_that_cannot_be_read_is_told_once_and_passed_over():
    def load(step):
        if step == broken:
            raise DataError(f"step {step} is damaged")
        return np.full((64, 64, 3), 255, np.uint8)

    broken, told = 1, []
    states = np.zeros((6, 7), np.float32)
    states[:, 0] = 0.02 * np.arange(6)
    episode = Episode(0, "reach the block", states, None, load, "test")
    samples = RecordedSamples([episode], load_template(PROMPT), 0, seed=0, report=told.append)
    for _ in range(2):
        assert [sample.phrase for sample in samples.draw(0, 6)] == ["move forward"] * 6
    assert list(map(str, told)) == ["step 1 is damaged"]

    lost = Episode(0, "reach the block", states, None, _fail_to_load, "test")
    with pytest.raises(DataError, match="100 frames in a row cannot be read"):
        RecordedSamples([lost], load_template(PROMPT), 0, seed=0).draw(0, 1)


def _fail_to_load(step):
    raise DataError("the disk is gone")


def _split(records):
    """Pixel values of what is trained on and of what is held out."""
    samples = RecordedSamples(records, load_template(PROMPT), 0, seed=0)
    parts = [sample for step in range(len(samples)) for sample in samples.draw(step, 1)], samples.draw_held_out(1000)
    return [{int(sample.image.max()) for sample in part} for part in parts]


def test_one_episode_in_twenty_is_never_trained_on():
    trained, held_out = _split([record_another(number) for number in range(200)])
    assert not trained & held_out and trained | held_out == set(range(200)) and 4 <= len(held_out) <= 20
    samples = RecordedSamples([record_another(number) for number in range(200)], load_template(PROMPT), 0, seed=0)
    assert samples.num_episodes == len(trained)  # "N steps of M episodes" counted those of the others, too
    assert len(_split([record_another(number) for number in range(20)])[1]) >= 1
    assert not _split([record_another(number) for number in range(19)])[1]  # too few to say much


def test_what_was_trained_on_is_not_held_out_when_recordings_are_added_before_it():
    old = [record_another(number) for number in range(60)]
    for num_new in (1, 7, 100):
        new = [record_another(number) for number in range(60, 60 + num_new)]
        assert not _split(old)[0] & _split(new + old[::-1])[1]


def test_a_copy_of_an_episode_is_on_the_same_side():
    records = [record_another(number) for number in range(60)]
    trained, held_out = _split(records + records[7:])
    assert held_out and not trained & held_out


def test_history_shows_the_phrases_before(tmp_path):
    template = tmp_path / "prompt.txt"
    template.write_text("[before]\n$instruction\n[after]\n$history\n")
    samples = RecordedSamples([record(0, 0, 255)], load_template(template), 2, seed=0)
    shown = sorted(sample.prompt.after.count("move forward") for sample in samples.draw(0, 3))
    assert shown == [0, 1, 2]


def test_history_begins_anew_with_a_new_instruction(tmp_path):
    """As a server's does, which takes it for a new episode."""
    template = tmp_path / "prompt.txt"
    template.write_text("[before]\n$instruction\n[after]\n$history\n")
    states = np.zeros((9, 7), np.float32)
    states[:, 0] = 0.02 * np.arange(9)
    said, image = ("reach",) * 3 + ("lift",) * 6, np.zeros((64, 64, 3), np.uint8)
    episode = Episode(0, "reach", states, None, lambda step: image, "test", said)
    samples = RecordedSamples([episode], load_template(template), 2, seed=0)
    prompts = [sample.prompt for sample in samples.draw(0, 6)]
    shown = sorted((prompt.before, prompt.after.count("move forward")) for prompt in prompts)
    assert shown == [("lift", 0), ("lift", 1), ("lift", 2), ("reach", 0), ("reach", 1), ("reach", 2)]


def test_data_without_a_labelled_step_is_refused():
    short = Episode(0, "", np.zeros((6, 7), np.float32), None, lambda step: None, "test")
    with pytest.raises(DataError, match="none of 1 episodes"):
        RecordedSamples([short], load_template(PROMPT), 0, seed=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    assert main(["train", "init-tiny", "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora", "2", "--bfloat16"]])
def test_the_command_tunes_the_embedded_model_on_rlds(more, tmp_path, tiny, bridge, capsys):
    out = tmp_path / "out"
    arguments = ["--model", str(tiny), "--data", str(bridge), "--out", str(out), "--steps", "2"]
    assert main(["train", "finetune", *arguments, "--samples", "2", "--warmup", "1", *more]) == 0
    assert "98 labelled steps of 14 episodes" in capsys.readouterr().out
    sidecar = json.loads((out / "vlm_local.json").read_text())
    assert sidecar["trained"] is True and sidecar["prompt"] == "prompt.txt"
    assert (out / "training" / "curves.png").stat().st_size > 1000
    assert ask(out, 255)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two data sets that are the same but for one position."""
    folders = []
    for name, shift in (("first", 0.0), ("second", 1e-3)):
        states = recordings.make_states(10, 1)
        states[4, 0] += shift
        folders.append(tmp_path_factory.mktemp(name))
        recordings.write_rlds(folders[-1], [recordings.make_rlds_record(states)])
    return folders


def test_the_command_refuses_to_go_on_with_other_settings_and_names_them(tmp_path, tiny, recorded, capsys):
    def run(out, data, *more) -> int:
        arguments = ["--model", tiny, "--data", data, "--out", out, "--steps", 1, "--samples", 1, "--warmup", 1]
        return main(["train", "finetune", *map(str, [*arguments, *more])])

    first, second = recorded
    assert run(tmp_path / "out", first) == 0
    for data, more, said in (
        (first, ("--learning-rate", 0.01), "learning_rate was 1e-05 and is 0.01"),
        (first, ("--bfloat16", "--seed", 1), "seed was 0 and is 1; bfloat16 was false and is true"),
        (first, ("--warmup", 2, "--samples", 2), "warmup_steps was 1 and is 2; samples_per_step was 1 and is 2"),
        (first, ("--prompt", "chat"), 'prompt_sha256 was "'),
        (first, ("--camera", "image_0"), 'data.camera was null and is "image_0"'),
        (second, (), 'data.sha256 was "'),
    ):
        assert run(tmp_path / "out", data, *more) == 2
        assert f"other settings: {said}" in capsys.readouterr().err
    assert run(tmp_path / "out", first, "--history", 2) == 2
    assert "does not show $history" in capsys.readouterr().err
    assert run(tmp_path / "out", first) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("not to be spoilt")
    assert run(tmp_path / "mine", first) == 2
    assert "holds something else" in capsys.readouterr().err


def test_what_the_prompt_says_of_the_camera_is_served_as_it_was_learnt(tmp_path, tiny, recorded, capsys):
    file, out = tmp_path / "mine.json", tmp_path / "out"
    arm = json.loads(find_file("bridge-widowx").read_text())
    file.write_text(json.dumps(arm | {"camera": arm["camera"] | {"view": "through a window"}}))
    arguments = ["--model", tiny, "--data", recorded[0], "--steps", 1, "--samples", 1, "--prompt", "chat", "--out"]
    command = ["train", "finetune", *map(str, arguments)]
    assert main([*command, str(out), "--embodiment", str(file)]) == 0
    file.unlink()
    request, _ = ResolvedOptions(PolicyOptions(model=str(out))).build_warm_up()
    assert "through a window" in request.prompt.before + request.prompt.after
    assert main([*command, str(out)]) == 2
    assert "other settings: camera_words was {" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert "embodiment" not in json.loads((tmp_path / "plain" / "vlm_local.json").read_text())  # any station's is found


@pytest.fixture
def bridge():
    folder = Path(__file__).parents[2].parent / "shared" / "data" / "bridge_dev"
    if not folder.exists():
        pytest.skip("needs ../shared/data/bridge_dev beside the repository")
    return folder
