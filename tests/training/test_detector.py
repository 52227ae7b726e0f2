"""Fine-tuning a success detector: what the pictures said is what the served folder answers."""

import json
import pickle

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from tests.tiny_models import tiny_checkpoint
from vlm_local.cli import main
from vlm_local.data.questions import LabelledImage
from vlm_local.errors import DataError
from vlm_local.prompts import load_template
from vlm_local.training.labelled import SIDE, LabelledSamples, change, split_by_episode

DRAWER = "is the drawer open? answer yes or no"


def picture(level, seed=0):
    noise = np.random.default_rng(seed).integers(-9, 10, (SIDE, SIDE, 3))
    return np.clip(level + noise, 0, 255).astype(np.uint8)


def label(number, answer, episode):
    return LabelledImage(picture(200 if answer == "yes" else 50, number), answer, f"picture {number}", episode)


def write_record(path, level, episodes):
    """A teleoperation's file: episodes of two steps, the second of which ends it."""
    steps = [
        {"observation": {"image_primary": picture(level, number)}, "done": bool(number % 2)}
        for number in range(2 * episodes)
    ]
    path.write_bytes(pickle.dumps(steps))


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    write_record(folder / "record-open-drawer.pkl", 220, 3)
    write_record(folder / "record-close-drawer.pkl", 30, 3)
    return folder


def train(folder, out, family="paligemma", *more):
    words = ["--model", tiny_checkpoint(family), "--data", folder, "--out", out, "--learning-rate", "0.003", *more]
    return main(["train", "detector", *map(str, words), "--device", "cpu", "--offline"])


@pytest.mark.slow
def test_the_command_trains_with_autoevals_settings_and_scores_what_it_has_not_seen(records, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(records, out, "qwen2-vl", "--epochs", "1", "--lora", "0") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["pictures"] == 8 and result["episodes"] == 4 and result["held_out"]["images"] == 4
    rows = [json.loads(line) for line in (out / "held-out/rows.jsonl").read_text().splitlines()]
    assert sorted(row["source"].rpartition(", ")[0] for row in rows) == [
        *["records/record-close-drawer.pkl"] * 2,
        *["records/record-open-drawer.pkl"] * 2,
    ]
    told = json.loads((out / "vlm_local.json").read_text())["training"]
    assert told["data"]["question"] == DRAWER and told["data"]["choices"] == ["yes", "no"]
    assert told["beta2"] == 0.999 and told["weight_decay"] == 1e-6 and told["falls_linearly"]
    assert told["num_steps"] == 1 and told["warmup_steps"] == 2 and told["samples_per_step"] == 16


@pytest.mark.long
@pytest.mark.parametrize("family", ["paligemma", "smolvlm2", "qwen2-vl"])
def test_the_tuned_detector_tells_pictures_apart(family, records, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(records, out, family, "--epochs", "40") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["held_out"]["accuracy"] == 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    weights = safetensors.torch.load_file(out / "adapter_model.safetensors")
    assert any("vision_tower" in name for name in weights) == (family == "paligemma")
    command = ["eval-answers", "--data", str(records), "--policy", str(out), "--out", str(tmp_path / "all")]
    assert main([*command, "--device", "cpu", "--offline"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == 1


def test_a_split_never_parts_an_episode_and_does_not_hang_on_the_order():
    labels = [label(n, ("yes", "no")[n % 2], f"{('yes', 'no')[n % 2]} {n // 10}") for n in range(40)]
    split = split_by_episode(labels)
    learnt, held_out = ({each.episode for each in part} for part in (split.learnt, split.held_out))
    assert not learnt & held_out and len(held_out) == 2 and {each.answer for each in split.held_out} == {"yes", "no"}
    assert {each.episode for each in split_by_episode(labels[::-1]).held_out} == held_out
    assert len(split.learnt) + len(split.held_out) == 40
    only = [label(number, "yes", "one") for number in range(3)]
    with pytest.raises(DataError, match="two answers"):
        split_by_episode(only)
    assert not split_by_episode([*only, label(9, "no", "two")]).held_out  # an answer's one episode is learnt from


def test_each_epoch_shows_every_picture_changed_otherwise_and_the_held_out_ones_as_they_are():
    labels = [label(number, ("yes", "no")[number % 2], f"episode {number}") for number in range(8)]
    split = split_by_episode(labels)
    samples = LabelledSamples(split, DRAWER, ("yes", "no"), load_template("paligemma_answer"), seed=0)
    first, second = samples.draw(0, len(samples)), samples.draw(1, len(samples))
    assert sorted(each.phrase for each in first) == sorted(each.phrase for each in second) == ["no"] * 3 + ["yes"] * 3
    assert all(each.image.shape == (240, 240, 3) for each in first)
    assert len({each.image.tobytes() for each in (*first, *second)}) == 12
    assert [each.image.tobytes() for each in samples.draw(0, 6)] == [each.image.tobytes() for each in first]
    held_out = {each.image.tobytes() for each in split.held_out}
    assert {each.image.tobytes() for each in samples.draw_held_out(64)} == held_out
    assert first[0].prompt.after == DRAWER


def test_a_changed_picture_is_the_same_scene():
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[: SIDE // 2] = (200, 60, 60)
    means = np.array([change(image, np.random.default_rng(seed))[:100].mean(axis=(0, 1)) for seed in range(20)])
    assert (means[:, 0] > means[:, 1]).all() and np.ptp(means[:, 0]) > 10
    assert np.abs(means.mean(axis=0) - (200, 60, 60)).max() < 25


def test_data_that_ask_different_things_are_refused(records, tmp_path, capsys):
    for answer in ("yes", "no"):
        (tmp_path / "plain" / answer).mkdir(parents=True)
        Image.fromarray(picture(90)).save(tmp_path / "plain" / answer / "0.png")
    assert train(tmp_path / "plain", tmp_path / "out") == 2
    assert "say with --question" in capsys.readouterr().err
    (tmp_path / "plain/yes").rename(tmp_path / "plain/maybe")
    command = ["train", "detector", "--model", "tiny", "--out", str(tmp_path / "out"), "--data"]
    assert main([*command, str(records), str(tmp_path / "plain")]) == 2
    assert "other answers" in capsys.readouterr().err
