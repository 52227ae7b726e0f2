"""Data sets whose instruction changes within an episode are read step by step."""

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests import recordings
from vlm_local.cli import main
from vlm_local.data import open_episodes
from vlm_local.data.runs import RunWriter
from vlm_local.lab.offline.answers import PolicyAnswerer
from vlm_local.prompts import load_template
from vlm_local.training.samples import RecordedSamples
from vlm_local.types import Decision

STATES = recordings.make_states(8)
SAID = ["lift the cup"] * 3 + [""] + ["close the drawer"] * 4


def _write_rlds(folder):
    recordings.write_rlds(folder, [recordings.make_rlds_record(STATES, SAID)])


def _write_lerobot(folder):
    recordings.write_lerobot(folder, [STATES], images="image")
    with (folder / "meta/tasks.jsonl").open("a") as file:
        file.write(json.dumps({"task_index": 2, "task": ""}) + "\n")
    (path,) = folder.glob("data/*/*.parquet")
    table = pq.read_table(path)
    place = table.column_names.index("task_index")
    tasks = [(*recordings.TASKS, "").index(text) for text in SAID]
    pq.write_table(table.set_column(place, "task_index", [tasks]), path)


def _write_teleop(folder):
    images = recordings.make_images(8)
    steps = [
        {
            "observation": {"image_primary": image, "state": state},
            "action": state,
            "metadata": {"language_instruction": text},
        }
        for image, state, text in zip(images, STATES, SAID, strict=True)
    ]
    folder.mkdir()
    (folder / "record.pkl").write_bytes(pickle.dumps(steps))


def _write_run(folder):
    writer = RunWriter(folder)
    writer.start_episode("robot")
    for step, (state, text) in enumerate(zip(STATES, SAID, strict=True)):
        line = {"robot": "robot", "step": step, "instruction": text, "proprio": state, "action": state}
        writer.add_step(line, np.zeros((32, 32, 3), np.uint8))
    writer.close()


@pytest.mark.parametrize("write", [_write_rlds, _write_lerobot, _write_teleop, _write_run])
def test_each_step_has_its_own_instruction(tmp_path, write):
    write(tmp_path / "data")
    (episode,) = open_episodes(tmp_path / "data")
    assert [episode.instruction_at(step) for step in range(8)] == SAID


@pytest.mark.parametrize(("tasks", "said"), [(["lift the cup"], "lift the cup"), (["lift the cup", "close it"], "")])
def test_a_step_of_an_unknown_task_has_the_episodes_only_one(tmp_path, tasks, said):
    """Which of several is meant, nothing says."""
    recordings.write_lerobot(tmp_path, [STATES], images="image")
    (tmp_path / "meta/tasks.jsonl").write_text("")
    path = tmp_path / "meta/episodes.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": tasks}))
    (episode,) = open_episodes(tmp_path)
    assert {episode.instruction_at(step) for step in range(8)} == {said}


def test_an_evaluation_asks_each_step_with_its_instruction_and_leaves_out_those_without(tmp_path):
    _write_rlds(tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--policy", "stop", "--out", str(tmp_path / "out")]
    assert main(["eval", *arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [(row["step"], row["instruction"]) for row in rows] == [
        (step, said) for step, said in enumerate(SAID) if said
    ]
    assert any(
        "step 3: the step has no instruction" in line
        for line in json.loads((tmp_path / "out/report.json").read_text())["left_out"]
    )


class _Recorder:
    """A policy that notes what it is asked."""

    def __init__(self):
        self.heard = []

    def reset(self, seed):
        self.heard.append("reset")

    def act(self, observation):
        self.heard.append(observation.instruction)
        return Decision(np.zeros(7), phrase="stop")


def test_a_policy_is_reset_where_the_instruction_changes(tmp_path):
    """As a server does, which begins a new episode then."""
    _write_rlds(tmp_path / "data")
    (episode,) = open_episodes(tmp_path / "data")
    policy = _Recorder()
    list(PolicyAnswerer(policy, 0).answer(episode, ["stop"] * 8, range(8), {}))
    assert policy.heard == ["reset", *["lift the cup"] * 3, "reset", *["close the drawer"] * 4]


def test_a_fine_tune_learns_each_step_under_its_instruction(tmp_path):
    _write_rlds(tmp_path / "data")
    samples = RecordedSamples(open_episodes(tmp_path / "data"), load_template("paligemma"), 0, seed=0)
    prompts = sorted(str(sample.prompt) for sample in samples.draw(0, len(samples)))
    assert len(samples) == 4  # of the five with a full window one has no instruction
    assert [("drawer" in prompt, "cup" in prompt) for prompt in prompts] == [(True, False)] + [(False, True)] * 3
