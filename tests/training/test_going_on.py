"""A fine-tuning that was killed, or whose disk was full, goes on by the same command, and no other one does there."""

import json
import math
import shutil

import pytest
import safetensors.torch

from tests.tiny_models import tiny_checkpoint
from tests.training.tuning import PROMPT, KilledAt, ask, record_another, tune
from vlm_local.errors import ConfigError, EngineError
from vlm_local.prompts import load_template
from vlm_local.training.samples import RecordedSamples


@pytest.mark.slow
def test_a_killed_run_ends_with_the_adapters_of_one_that_was_not(samples, tmp_path):
    base, name = tiny_checkpoint("qwen2-vl"), "adapter_model.safetensors"
    tune(base, tmp_path / "whole", samples, num_steps=8, lora=4)
    with pytest.raises(KeyboardInterrupt):  # saved at 5, killed at 7
        tune(base, tmp_path / "killed", KilledAt(7, samples), num_steps=8, lora=4)
    tune(base, tmp_path / "killed", samples, num_steps=8, lora=4)
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    logs = [(tmp_path / run / "training" / "log.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    steps = [[(line["step"], line["loss"]) for line in map(json.loads, log)] for log in logs]
    assert steps[0] == steps[1]


def test_weights_and_dropout_are_the_same_after_a_kill(samples, tmp_path):
    base = shutil.copytree(tiny_checkpoint("qwen2-vl"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.5
    (base / "config.json").write_text(json.dumps(config))
    tune(base, tmp_path / "whole", samples, num_steps=3, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        tune(base, tmp_path / "killed", KilledAt(2, samples), num_steps=3, save_every=1)
    tune(base, tmp_path / "killed", samples, num_steps=3, save_every=1)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_training_goes_on_with_other_portions_and_with_nothing_else_changed(samples, tmp_path):
    base, out = tiny_checkpoint("qwen2-vl"), tmp_path / "out"
    tune(base, out, samples, num_steps=6)
    weights = (out / "model.safetensors").read_bytes()
    tune(base, out, samples, num_steps=6, at_once=2)
    for changes, said in (
        ({"folder": tiny_checkpoint("paligemma")}, 'base_sha256 was "'),
        ({"num_steps": 12}, "num_steps was 6 and is 12;"),
        ({"lora": 4}, "lora was 0 and is 4;"),
    ):
        with pytest.raises(ConfigError, match=f"other settings: {said}"):
            tune(**{"folder": base, "out": out, "samples": samples, "num_steps": 6, **changes})
    assert (out / "model.safetensors").read_bytes() == weights


def test_a_training_that_skipped_its_steps_writes_no_model(samples, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen2-vl"), tmp_path / "spoilt")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match="gradients that are not finite"):
        tune(folder, tmp_path / "out", samples, num_steps=2)
    assert not (tmp_path / "out" / "vlm_local.json").exists()


def test_a_full_disk_keeps_the_last_state_and_says_what_to_do(samples, tmp_path, monkeypatch):
    def fill_the_disk(value, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/12")

    base, out = tiny_checkpoint("qwen2-vl"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tune(base, out, KilledAt(2, samples), num_steps=4, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", fill_the_disk)
        with pytest.raises(EngineError, match=r"after step 3 cannot be written .*GB are free; make room"):
            tune(base, out, samples, num_steps=4, save_every=1)
    assert {file.name for file in (out / "training").iterdir()} == {"settings.json", "log.jsonl", "state.pt", ".lock"}
    state = out / "training" / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:1000])
    with pytest.raises(ConfigError, match=r"state\.pt cannot be read.*begins anew"):
        tune(base, out, samples, num_steps=4, save_every=1)
    state.write_bytes(whole)
    tune(base, out, samples, num_steps=4, save_every=1)


def test_a_second_training_in_the_same_folder_is_refused(samples, tmp_path):
    class Meanwhile(KilledAt):
        def draw(self, step, num_samples):
            tune(base, out, samples, num_steps=2)

    base, out = tiny_checkpoint("qwen2-vl"), tmp_path / "out"
    with pytest.raises(ConfigError, match="in use by another process"):
        tune(base, out, Meanwhile(0, samples), num_steps=2)
    tune(base, out, samples, num_steps=2)


def test_what_a_full_disk_left_before_the_first_step_is_no_other_training(samples, tmp_path):
    place = tmp_path / "out" / "training"
    place.mkdir(parents=True)
    (place / ".lock").touch()
    (place / "settings.json.new").write_text('{"data"')
    tune(tiny_checkpoint("qwen2-vl"), tmp_path / "out", samples, num_steps=1)


def test_a_model_that_cannot_be_written_is_written_by_the_same_command(samples, tmp_path):
    """Until its weights are there, what stands beside them is not the base's."""
    base, out, prompt = tmp_path / "base", tmp_path / "out", tmp_path / "mine.txt"
    shutil.copytree(tiny_checkpoint("qwen2-vl"), base)
    (base / "vlm_local.json").write_text('{"prompt": "chat"}')
    prompt.write_text("[before]\nMine: $instruction\n[after]\nGo.\n")
    (out / "model.safetensors").mkdir(parents=True)
    with pytest.raises(EngineError, match=r"cannot be written to .*out .*the same command writes it"):
        tune(base, out, samples, num_steps=2, prompt=prompt)
    assert json.loads((out / "vlm_local.json").read_text())["prompt"] == "prompt.txt"
    (out / "model.safetensors").rmdir()
    tune(base, out, samples, num_steps=2, prompt=prompt)
    assert ask(out, 255)


def test_what_failed_before_its_first_step_may_be_begun_otherwise(tmp_path, samples):
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_checkpoint("qwen2-vl"), tmp_path, KilledAt(0, samples), num_steps=2)
    tune(tiny_checkpoint("qwen2-vl"), tmp_path, samples, num_steps=2, lora=2)


def test_the_loss_of_what_is_held_out_is_logged_each_time_the_state_is_saved(tmp_path):
    samples = RecordedSamples(map(record_another, range(21)), load_template(PROMPT), 0, seed=0)
    tune(tiny_checkpoint("qwen2-vl"), tmp_path / "out", samples, num_steps=2, save_every=1)
    lines = [json.loads(line) for line in (tmp_path / "out/training/log.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "loss held_out" in line]
    assert [line["step"] for line in held_out] == [1, 2] and all(line["loss held_out"] > 0 for line in held_out)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_checkpoint("qwen2-vl"), tmp_path / "killed", KilledAsking(samples, 2), num_steps=2, save_every=1)
    tune(tiny_checkpoint("qwen2-vl"), tmp_path / "killed", samples, num_steps=2, save_every=1)
    again = [json.loads(line) for line in (tmp_path / "killed/training/log.jsonl").read_text().splitlines()]
    assert [{**line, "seconds": 0} for line in again] == [{**line, "seconds": 0} for line in lines]


class KilledAsking(KilledAt):
    """Killed the n-th time that it is asked what is held out."""

    def __init__(self, samples, n):
        super().__init__(None, samples)
        self._left = n

    def draw_held_out(self, num_samples):
        samples, outer = self._samples.draw_held_out(num_samples), self

        class Sample:
            image, phrase = samples[0].image, samples[0].phrase

            @property
            def prompt(self):
                outer._left -= 1
                if not outer._left:
                    raise KeyboardInterrupt
                return samples[0].prompt

        return [Sample(), *samples[1:]]
