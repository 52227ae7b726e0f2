"""The decoding benchmark, end to end on a small model, and the page made of its results."""

import json

import numpy as np
import pytest
import torch

from tests.tiny_models import tiny_checkpoint
from vlm_local.bench.sequences import GENERATED, load_sequences
from vlm_local.bench.shapes import _build_tokenizer
from vlm_local.bench.subject import load_subject
from vlm_local.cli import main
from vlm_local.data.runs import RunWriter
from vlm_local.decoding.trie import build_trie, tokenize_sentences
from vlm_local.errors import ConfigError
from vlm_local.policy_options import PolicyOptions
from vlm_local.primitives import list_phrases

WAYS = [
    "outlines",
    "trie",
    "draft",
    "served",
    "served_fast",
    "served_contrast",
    "served_growing",
    "posterior_fast",
    "posterior_exact",
]
SAID = [["stop", "stop", "move left"], ["move left, close gripper"]]


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"episodes": [{"instruction": "lift it", "phrases": each} for each in SAID]}))
    return path


@pytest.mark.slow
def test_all_ways_play_the_same_steps(labels, capsys):
    flags = ["--model", str(tiny_checkpoint("qwen2-vl")), "--sequences", str(labels), "--rounds", "4"]
    assert main(["bench", "decode", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["x_prefill"]) == WAYS
    assert all({"median", "mean", "p95", "n"} == set(times) for times in result["x_prefill"].values())
    assert {times["n"] for times in (*result["x_prefill"].values(), *result["ms"].values())} == {4}
    assert set(result["ms"]) == {*WAYS, "prefill", "read_blank"}
    assert result["x_prefill_read_blank"]["n"] == result["contrast_x_served"]["n"] == 4
    assert all(times["p50"] <= times["p95"] <= times["p99"] for times in result["ms"].values())
    assert result["steered"] is True and result["disagreements"] == 0 and result["different_phrases"] == 3
    assert result["followed_steering"] == 1.0 and list(result["x_prefill_cpu"]) == WAYS
    forwards = result["forwards_per_step"]
    assert 1.0 <= forwards["draft"] <= forwards["trie"] < forwards["outlines"]
    assert 0.0 <= result["draft_hit_rate"] <= 1.0 and result["posterior_fast_missing_mass"]["n"] == 4


@pytest.mark.slow
def test_a_run_with_pictures_is_played_unsteered(tmp_path, capsys):
    from numpy import zeros

    with_frames = RunWriter(tmp_path / "run")
    with_frames.start_episode("arm")
    for _ in range(2):
        line = {"robot": "arm", "phrase": "stop", "instruction": "wait", "action": [0.0] * 7, "proprio": [0.0] * 7}
        with_frames.add_step(line, zeros((64, 64, 3), "uint8"))
    with_frames.close()
    flags = ["--model", str(tiny_checkpoint("qwen2-vl")), "--sequences", str(tmp_path / "run"), "--rounds", "2"]
    assert main(["bench", "decode", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steered"] is False and result["sequences"] == "run" and result["disagreements"] == 0
    assert result["followed_steering"] == 0.0


def test_sequences_from_labels_and_made_up_ones(labels, tmp_path):
    assert [list(each.phrases) for each in load_sequences(labels)[1]] == SAID
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"episode": n // 2, "phrase": "stop"}) for n in range(4)))
    assert [each.phrases for each in load_sequences(rows)[1]] == [("stop", "stop")] * 2
    source, made_up = load_sequences(None)
    assert source == GENERATED and set().union(*(each.phrases for each in made_up)) <= set(list_phrases())
    rows.write_text("[]\n")
    with pytest.raises(ConfigError, match="no file of labels"):
        load_sequences(rows)


def test_the_shape_spells_phrases_as_qwen_does():
    """Figures of Qwen2's real tokenizer: 10.6 tokens a phrase, 26 live tokens, 838 nodes to read."""
    phrases = list_phrases()
    tokens = tokenize_sentences(_build_tokenizer(151_936), phrases, 5_000, 151_645)
    trie = build_trie(phrases, tokens, 151_645)
    assert (len(trie), trie.branching.sum(), trie.needed.sum(), len(trie.live_tokens)) == (2297, 594, 838, 26)
    assert sum(map(len, tokens)) / len(tokens) == pytest.approx(10.62, abs=0.01)


def test_prompts_of_a_shape_end_alike():
    """As a chat template's do: else each step would build a trie of its own and know nothing of the step before."""
    subject = load_subject(PolicyOptions(), "small", 1)
    generator = np.random.default_rng(0)
    one, other = (subject.prepare(subject.draw_request(generator, "a")).input_ids for _ in range(2))
    assert one[-1] == other[-1] and not torch.equal(one, other)


def test_a_report_holds_every_figure_and_says_where_from(tmp_path, capsys):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    assert main(["bench", "report", str(folder)]) == 2
    about = {"versions": {"torch": "2"}, "git": "abc", "machine": {"processor": "P", "cores": 2}}
    groups = {"groups": {"a": {"n": 1}, "b": {"n": 2, "p95": 3.0}}, "families": {"f": {"g": {"n": 4}, "right": True}}}
    result = {"benchmark": "x", "rate": 1.23456, "layers": None, **groups, **about}
    (folder / "first.json").write_text("a table\n" + json.dumps(result))
    assert main(["bench", "report", str(folder)]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| rate | 1.235 |" in page and "| b | 2 | 3 |" in page and "P, 2 cores; torch 2; commit abc" in page
    assert "| f, g | 4 | yes |" in page and "None" not in page
    (folder / "second.json").write_text("{}")
    assert main(["bench", "report", str(folder)]) == 2
    assert "names no benchmark" in capsys.readouterr().err
