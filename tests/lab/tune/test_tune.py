"""`tune` from end to end: what it keeps, what it looks at and when, how it goes on, what it refuses."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests import recordings
from tests.decoding.tiny import bias_tree
from tests.tiny_models import tiny_checkpoint
from vlm_local import data, examples
from vlm_local.cli import build_parser, main
from vlm_local.cli.options import fill_from_settings, read_policy_options
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.lab.tune.report import describe_verdict

NUM_EPISODES, NUM_STEPS = 10, 5  # of which the first is asked
PROMPT = "[before]\n$instruction\n[example]\n$picture\nright: $phrase\n[reasoning]\n$reasoning\n[after]\n$proprio\n"


def tune(data_set, out, *flags) -> int:
    return main(["tune", "--data", str(data_set), "--out", str(out), *map(str, flags)])


def read_rows(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set, and a short prompt."""
    folder = tmp_path_factory.mktemp("tune")
    still = [1, 1, 1, 0, 0, 0, 0]  # nothing turns, so that a small grammar holds all labels
    records = [
        recordings.make_rlds_record(
            recordings.make_states(NUM_STEPS, seed) * np.float32(still),
            images=list(map(recordings.encode_image, recordings.make_images(NUM_STEPS, seed))),
        )
        for seed in range(NUM_EPISODES)
    ]
    recordings.write_rlds(folder / "data", records)
    (folder / "short.txt").write_text(PROMPT)
    return folder


@pytest.fixture(scope="module")
def biased():
    """Models that are loaded meanwhile prefer " forward" whatever they see."""
    model = tiny_checkpoint("qwen2-vl")
    [token] = AutoTokenizer.from_pretrained(model)(" forward", add_special_tokens=False)["input_ids"][:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeDecoder, "session_type", TreeDecoder.session_type)  # is put back
        bias_tree(TreeDecoder, token, 8.0)
        yield model


@pytest.fixture(scope="module")
def flags(place, biased):
    words = "--every 5 --rungs marks,examples,think,contrast --dtype float32 --grammar primitives_moves"
    return ["--model", biased, "--prompt", place / "short.txt", *words.split()]


@pytest.fixture(scope="module")
def seen():
    """Every picture that was read: number of its episode, and step."""
    return []


@pytest.fixture(scope="module")
def result(place, flags, seen):
    open_data_set = data.open_data_set

    def watch(*arguments):
        found = open_data_set(*arguments)
        return replace(found, episodes=map(listen, found.episodes))

    def listen(episode):
        def load_image(step, load=episode.load_image):
            seen.append((episode.index, step))
            return load(step)

        return replace(episode, load_image=load_image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "open_data_set", watch)
        patch.setattr(examples, "open_data_set", watch)
        patch.setattr("vlm_local.lab.tune.episodes.MAX_TIMED", 2)
        assert tune(place / "data", place / "out", *flags) == 0
    return place / "out"


@pytest.mark.slow
def test_a_contrast_is_found_that_takes_a_constant_out(result):
    report = json.loads((result / "report.json").read_text())
    marks, shown, thinking, contrast = report["rungs"]
    assert "camera_matrix" in marks["skipped"] and len(shown["variants"]) == 3
    [thought] = thinking["variants"]  # no first step of an episode has one yet, and only these are asked here
    assert thought["difference"]["log_loss"] == 0 and not thought["kept"] and thought["cost"]["n"] == 2
    [kept] = [entry for entry in contrast["variants"] if entry["kept"]]
    assert kept["setting"]["contrast"] > 0 and kept["difference"]["p_holm"] < 0.05
    assert kept["difference"]["log_loss_interval"][1] < 0 and kept["cost"]["ratio"] > 0
    losses = [entry["development"]["log_loss"] for entry in contrast["variants"]]
    assert kept["development"]["log_loss"] == min(losses)
    held_out = report["held_out"]
    gain = held_out["chosen"]["log_loss"] - held_out["base"]["log_loss"]
    assert held_out["difference"]["log_loss"] == pytest.approx(gain) and gain < 0
    table = (result / "report.md").read_text()
    assert "kept" in table and "skipped: --marks needs to know" in table
    assert "cannot be told from the base (p 0." in (result / "report.html").read_text()
    held_out["difference"]["log_loss_interval"] = [
        -2.0,
        -1.0,
    ]  # three episodes can show no difference, whatever it says
    assert "cannot be told from the base (p 0." in describe_verdict(report)


def test_held_out_episodes_are_looked_at_once_and_last(result, seen):
    split = json.loads((result / "report.json").read_text())["split"]
    held_out, development = set(split["held_out"]), set(split["development"])
    assert len(held_out) == 3 and not held_out & development and len(development) == 7
    parts = [row["part"] for row in read_rows(result)]
    assert parts.count("held_out") == parts[-7:].count("held_out") == 2 * 3  # and a time, of the choice
    assert "development" not in parts[parts.index("held_out") :]
    looked = [each for each in seen if each[0] in held_out]
    assert sorted(looked) == sorted(2 * [(number, 0) for number in held_out])
    assert json.loads((result / "examples.json").read_text())["episodes"] == split["development"]


def test_the_same_command_goes_on_and_a_finished_tuning_asks_nothing(result, place, flags, monkeypatch):
    monkeypatch.setattr("vlm_local.lab.tune.episodes.MAX_TIMED", 2)
    out = place / "again"
    shutil.copytree(result, out)
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if '"contrast": 0.5' in line)
    (out / "rows.jsonl").write_text("".join(lines[: at + 3]) + lines[at + 3][:20])
    assert tune(place / "data", out, *flags) == 0
    assert _drop_times(out) == _drop_times(result)
    before = (out / "rows.jsonl").read_bytes()
    monkeypatch.setattr("vlm_local.lab.tune.ask.open_policies", None)
    assert tune(place / "data", out, *flags) == 0
    assert (out / "rows.jsonl").read_bytes() == before


def _drop_times(out):
    report = json.loads((out / "report.json").read_text())
    for entry in [report["held_out"], *(entry for rung in report["rungs"] for entry in rung["variants"])]:
        entry.pop("cost", None)
    return {name: report[name] for name in ("base", "rungs", "chosen", "held_out", "split")}


def test_another_choice_on_the_same_held_out_episodes_is_refused(result, place, flags, capsys):
    assert tune(place / "data", result, *flags, "--rungs", "contrast") == 2
    assert "plan.rungs was" in capsys.readouterr().err


def test_serve_takes_the_choice_and_flags_count_before_it(result, biased):
    chosen = json.loads((result / "report.json").read_text())["chosen"]
    args = build_parser().parse_args(["serve", "--settings", str(result / "vlm_local.json"), "--history", "1"])
    fill_from_settings(args)
    options = read_policy_options(args)
    assert options.model == str(biased) and options.contrast == chosen["contrast"] and options.history == 1
    assert options.prompt == str(result / "short.txt") and (result / "short.txt").read_text() == PROMPT


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--limit", 8], "8 episodes can be scored, and `tune` needs 9"),
        (["--model", "stop"], "no model is loaded for 'stop'"),
        (["--model", "http://127.0.0.1:9"], "which no server tells"),
        (["--engine", "openai", "--engine-url", "http://127.0.0.1:9"], "which no server tells"),
        (["--examples", "data:4"], "--examples is tried by `tune` itself"),
        (["--rungs", "contrst"], "did you mean contrast?"),
        (["--settings", "nowhere.json"], "--settings nowhere.json cannot be read"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_sentence(place, tmp_path, capsys, given, says):
    model = ["--model", tiny_checkpoint("qwen2-vl")]
    assert tune(place / "data", tmp_path / "out", *model, *given) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_episodes_without_labels_are_refused(tmp_path, capsys):
    records = [recordings.make_rlds_record(recordings.make_states(5, seed), "") for seed in range(10)]
    recordings.write_rlds(tmp_path / "data", records)
    assert tune(tmp_path / "data", tmp_path / "out", "--model", tiny_checkpoint("qwen2-vl")) == 2
    assert "no episode has labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"contrast": "much"}', "'contrast' is 'much', which is of the wrong type"),
        ('{"history": true}', "'history' is True, which is of the wrong type"),
        ('{"alpha": 1}', "there is no option 'alpha'"),
        ("[]", "cannot be read"),
    ],
)
def test_a_file_of_settings_that_is_none_is_refused(tmp_path, capsys, content, says):
    (tmp_path / "mine.json").write_text(content)
    assert main(["replay", str(tmp_path), "--policy", "stop", "--settings", str(tmp_path / "mine.json")]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.long
def test_a_contrast_is_found_for_the_embedded_model_with_a_constant(tmp_path):
    """On recorded episodes of the simulator's oracle, whose labels this model was not trained on."""
    words = "sim --policy oracle --task lift --episodes 12 --films 12 --seed 63000 --workers 1 -q --out"
    assert main([*words.split(), str(tmp_path / "data")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeDecoder, "session_type", TreeDecoder.session_type)
        [token] = AutoTokenizer.from_pretrained("checkpoints/tiny")(" forward", add_special_tokens=False)["input_ids"]
        bias_tree(TreeDecoder, token, 8.0)
        assert tune(tmp_path / "data", tmp_path / "out", "--every", 4, "--rungs", "frames,think,contrast") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "reads only one" in report["rungs"][0]["skipped"]
    assert "only gives short answers" in report["rungs"][1]["skipped"] and report["chosen"]["contrast"] > 0
