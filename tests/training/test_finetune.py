"""Fine-tuning of every kind of family: what was learnt is what the served model says."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from tests import recordings
from tests.tiny_models import tiny_checkpoint
from vlm_local.assembly import open_policies
from vlm_local.checkpoint import open_checkpoint
from vlm_local.cli import main
from vlm_local.errors import ConfigError, DataError, EngineError
from vlm_local.policy_options import PolicyOptions
from vlm_local.prompts import load_template
from vlm_local.training.finetune import Tuning, finetune
from vlm_local.training.optimisation import Recipe
from vlm_local.training.samples import HELD_OUT_EVERY, RecordedSamples
from vlm_local.types import Episode, Observation

PROMPT = "paligemma"


def _record(index, direction, colour):
    """Six steps of motion along one axis, under a picture of one colour."""
    states = np.zeros((6, 7), np.float32)
    states[:, direction] = 0.02 * np.arange(6)
    image = np.full((64, 64, 3), colour, np.uint8)
    return Episode(index, "reach the block", states, None, lambda step: image, f"test {index}")


@pytest.fixture
def samples():
    """White goes forward, black goes up."""
    return RecordedSamples([_record(0, 0, 255), _record(1, 2, 0)], load_template(PROMPT), 0, seed=0)


def _tune(folder, out, samples, num_steps=40, save_every=5, **fields):
    recipe = Recipe(num_steps, 3e-3, warmup_steps=5, log_every=10, save_every=save_every)
    checkpoint = open_checkpoint(folder)
    tuning = Tuning(recipe, **{"samples": 6, "at_once": 3, **fields})
    finetune(checkpoint, samples, tuning, PROMPT, 0, out, seed=0, data={"sha256": "of these samples"})


def _ask(folder, colour):
    policies = open_policies(PolicyOptions(model=str(folder), offline=True))
    try:
        image = np.full((64, 64, 3), colour, np.uint8)
        return policies.build("robot").act(Observation(image, "reach the block", np.zeros(7))).phrase
    finally:
        policies.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2-vl", "paligemma", "smolvlm2"])
def test_the_tuned_model_says_what_it_learnt(family, samples, tmp_path):
    _tune(tiny_checkpoint(family), tmp_path, samples, save_every=40)
    assert (_ask(tmp_path, 255), _ask(tmp_path, 0)) == ("move forward", "move up")


@pytest.mark.slow
def test_adapters_are_a_folder_that_brings_its_base(samples, tmp_path):
    base = tiny_checkpoint("qwen2-vl")
    _tune(base, tmp_path, samples, num_steps=50, lora=16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert json.loads((tmp_path / "vlm_local.json").read_text())["training"]["skipped_steps"] == 0
    assert not (tmp_path / "model.safetensors").exists()
    assert (_ask(tmp_path, 255), _ask(tmp_path, 0)) == ("move forward", "move up")


class KilledAt:
    """The samples, up to a step at which somebody presses Ctrl-C."""

    def __init__(self, step, samples):
        self._step, self._samples = step, samples
        self.num_episodes = samples.num_episodes
        self.draw_held_out = samples.draw_held_out

    def __len__(self):
        return len(self._samples)

    def draw(self, step, num_samples):
        if step == self._step:
            raise KeyboardInterrupt
        return self._samples.draw(step, num_samples)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 4])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(lora, samples, tmp_path):
    base = tiny_checkpoint("qwen2-vl")
    _tune(base, tmp_path / "whole", samples, num_steps=8, lora=lora)
    with pytest.raises(KeyboardInterrupt):  # saved at 5, killed at 7
        _tune(base, tmp_path / "killed", KilledAt(7, samples), num_steps=8, lora=lora)
    _tune(base, tmp_path / "killed", samples, num_steps=8, lora=lora)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    logs = [(tmp_path / run / "training" / "log.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    steps = [[(line["step"], line["loss"]) for line in map(json.loads, log)] for log in logs]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_a_training_goes_on_with_other_portions_and_with_nothing_else_changed(samples, tmp_path):
    base, out = tiny_checkpoint("qwen2-vl"), tmp_path / "out"
    _tune(base, out, samples, num_steps=6)
    weights = (out / "model.safetensors").read_bytes()
    _tune(base, out, samples, num_steps=6, at_once=2)
    for changes, said in (
        ({"folder": tiny_checkpoint("paligemma")}, 'base_sha256 was "'),
        ({"num_steps": 12}, "num_steps was 6 and is 12;"),
        ({"lora": 4}, "lora was 0 and is 4;"),
    ):
        with pytest.raises(ConfigError, match=f"other settings: {said}"):
            _tune(**{"folder": base, "out": out, "samples": samples, "num_steps": 6, **changes})
    assert (out / "model.safetensors").read_bytes() == weights


def test_a_training_that_skipped_its_steps_writes_no_model(samples, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen2-vl"), tmp_path / "spoilt")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match="gradients that are not finite"):
        _tune(folder, tmp_path / "out", samples, num_steps=2)
    assert not (tmp_path / "out" / "vlm_local.json").exists()


def test_a_quantised_model_is_not_trained(samples, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen2-vl"), tmp_path / "stored")
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ConfigError, match=r"quantised \(bitsandbytes-4bit\).*unquantised folder"):
        _tune(folder, tmp_path / "out", samples, num_steps=2)


def test_samples_are_the_labels_of_the_steps(samples):
    epoch = samples.draw(0, len(samples))
    assert len(samples) == 6  # three full windows of each
    assert sorted(sample.phrase for sample in epoch) == ["move forward"] * 3 + ["move up"] * 3
    assert all((sample.image.max() == 255) == (sample.phrase == "move forward") for sample in epoch)
    halves = samples.draw(0, 3) + samples.draw(1, 3)  # an epoch is the same however it is cut
    assert [sample.prompt for sample in halves] == [sample.prompt for sample in epoch]


def test_in_place_of_a_frame_that_cannot_be_read_the_next_one_is_drawn():
    """One bad frame of a data set ended a training of hours, and the same command ended there again."""

    def load_broken(step):
        raise DataError(f"step {step} is broken")

    episodes = [_record(index, 0, 255) for index in range(2 * HELD_OUT_EVERY)]
    for index in (0, HELD_OUT_EVERY - 1):  # one of those for training, one of those kept apart
        episodes[index] = replace(episodes[index], load_image=load_broken)
    problems = []
    samples = RecordedSamples(episodes, load_template(PROMPT), 0, seed=0, report=problems.append)
    drawn = samples.draw(0, len(samples))
    assert len(drawn) == len(samples) and len(problems) == 3 and "is broken" in str(problems[0])
    assert samples.draw(0, len(samples))[5].prompt == drawn[5].prompt
    assert len(samples.draw_held_out(100)) == 3 and len(problems) == 9
    broken = RecordedSamples([replace(episodes[0])], load_template(PROMPT), 0, seed=0, report=lambda problem: None)
    with pytest.raises(DataError, match="50 frames one after the other could not be read"):
        broken.draw(0, 1)


def test_history_shows_the_phrases_before(tmp_path):
    template = tmp_path / "prompt.txt"
    template.write_text("[before]\n$instruction\n[after]\n$history\n")
    samples = RecordedSamples([_record(0, 0, 255)], load_template(template), 2, seed=0)
    shown = sorted(sample.prompt.after.count("move forward") for sample in samples.draw(0, 3))
    assert shown == [0, 1, 2]


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
    assert _ask(out, 255)


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
    def tune(out, data, *more) -> int:
        arguments = ["--model", tiny, "--data", data, "--out", out, "--steps", 1, "--samples", 1, "--warmup", 1]
        return main(["train", "finetune", *map(str, [*arguments, *more])])

    first, second = recorded
    assert tune(tmp_path / "out", first) == 0
    for data, more, said in (
        (first, ("--learning-rate", 0.01), "learning_rate was 1e-05 and is 0.01"),
        (first, ("--bfloat16", "--seed", 1), "seed was 0 and is 1; bfloat16 was false and is true"),
        (first, ("--history", 2, "--samples", 2), "history was 0 and is 2; samples_per_step was 1 and is 2"),
        (first, ("--prompt", "chat"), 'prompt_sha256 was "'),
        (first, ("--camera", "image_0"), 'data.camera was null and is "image_0"'),
        (second, (), 'data.sha256 was "'),
    ):
        assert tune(tmp_path / "out", data, *more) == 2
        assert f"other settings: {said}" in capsys.readouterr().err
    assert tune(tmp_path / "out", first) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("not to be spoilt")
    assert tune(tmp_path / "mine", first) == 2
    assert "holds something else" in capsys.readouterr().err


def test_what_failed_before_its_first_step_may_be_begun_otherwise(tmp_path, samples):
    with pytest.raises(KeyboardInterrupt):
        _tune(tiny_checkpoint("qwen2-vl"), tmp_path, KilledAt(0, samples), num_steps=2)
    _tune(tiny_checkpoint("qwen2-vl"), tmp_path, samples, num_steps=2, lora=2)


@pytest.fixture
def bridge():
    folder = Path(__file__).parents[2].parent / "shared" / "data" / "bridge_dev"
    if not folder.exists():
        pytest.skip("needs ../shared/data/bridge_dev beside the repository")
    return folder


def test_every_twentieth_episode_is_never_trained_on_and_its_loss_is_logged(tmp_path):
    """Episodes that are trained on are white and go forward; the one that is kept apart is black and goes up."""
    records = [_record(index, 2 if index == 19 else 0, 0 if index == 19 else 255) for index in range(21)]
    samples = RecordedSamples(records, load_template(PROMPT), 0, seed=0)
    assert len(samples) == 20 * 3 and samples.num_episodes == 21
    drawn = [sample for step in range(20) for sample in samples.draw(step, 6)]
    assert {(sample.phrase, int(sample.image.max())) for sample in drawn} == {("move forward", 255)}
    assert {(sample.phrase, int(sample.image.max())) for sample in samples.draw_held_out(64)} == {("move up", 0)}
    _tune(tiny_checkpoint("qwen2-vl"), tmp_path / "out", samples, num_steps=4, save_every=2)
    lines = [json.loads(line) for line in (tmp_path / "out/training/log.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "loss held_out" in line]
    assert [line["step"] for line in held_out] == [2, 4] and all(line["loss held_out"] > 0 for line in held_out)
    assert held_out[-1]["exact held_out"] == 0
