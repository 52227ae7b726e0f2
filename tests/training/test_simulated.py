"""Rounds in the simulator: whose labels they are, that a seed fixes them, that a kill changes nothing."""

import json
import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from vlm_local.actions import build_action
from vlm_local.errors import ConfigError
from vlm_local.primitives import parse_phrase
from vlm_local.sim.block_tasks import RELATIONS
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.furniture import NUM_BLOCKS
from vlm_local.sim.oracle import Oracle
from vlm_local.training.collect import collect, load_shard, save_shard
from vlm_local.training.optimisation import Recipe
from vlm_local.training.questions import list_questions
from vlm_local.training.rounds import RoundSpec, collect_round, measure_round, open_student
from vlm_local.training.simulated import Course, SimulatedTraining
from vlm_local.training.tiny import SIDECAR, write_sidecar, write_tiny
from vlm_local.types import Primitive

# What is asked of one scene besides: a block named by its place, where that is clear.
TASKS_OF_A_SCENE = [("reach", 4), ("push", 4), ("reach_relation", 5), ("open_drawer", 2), ("eggplant_in_sink", 2)]
TASKS_OF_A_SCENE += [("reach_shown", 5), ("put_back", 5)]


@pytest.mark.parametrize(("task", "num_questions"), TASKS_OF_A_SCENE)
def test_every_question_has_the_oracles_answer(task, num_questions):
    env = SimEnv(task, image_size=None)
    env.reset(seed=5)
    own, instruction = env.task, env.task.instruction
    asked = list_questions(env, np.random.default_rng(0))
    assert env.task is own and own.instruction == instruction  # the episode goes on as it was
    assert asked[0].instruction == instruction
    assert parse_phrase(asked[0].phrase) == Oracle(env).primitive()
    assert len({question.instruction for question in asked}) == len(asked)
    assert len([question for question in asked[1:] if question.task != "reach_relation"]) == num_questions - 1


def test_a_block_is_named_by_its_place_only_where_that_is_clear():
    env, found = SimEnv("reach", image_size=None), 0
    for seed in range(20):
        env.reset(seed=seed)
        for question in list_questions(env, np.random.default_rng(seed)):
            if question.task == "reach_relation":
                found += 1
                side = np.array(RELATIONS[question.names["relation"]])
                reference = env.world.place(f"block{env.task.colours.index(question.names['colour'])}")
                beside = [
                    (env.world.place(f"block{index}") - reference)[:2] @ side > 0.03 for index in range(NUM_BLOCKS)
                ]
                offset = env.world.tips + question.offset_m - reference
                assert offset[:2] @ side > 0.08 and sum(beside) == 1
    assert found > 5


def test_following_one_of_the_other_answers_reaches_the_other_block():
    env = SimEnv("reach", image_size=None)
    env.reset(seed=1)
    for _ in range(40):
        other = list_questions(env, np.random.default_rng(0))[1]
        *_, ended, _, info = env.step(build_action(parse_phrase(other.phrase), 1.0))
        if ended:
            break
    assert info["lost"]  # another block than the episode's own
    assert np.hypot(*other.offset_m[:2]) < 0.03


def test_frames_go_on_after_a_success_and_there_stop_is_right():
    shard = collect({"open_drawer": 1.0}, {"easy": 1.0}, 60, 128, (0, 2), None)
    own = [asked[0].phrase for asked in shard.questions]
    after = [index for index, phrase in enumerate(own) if phrase == "stop"]
    assert after and all(shard.questions[index][1].phrase != "stop" for index in after)  # to close it


@pytest.mark.slow
def test_a_seed_fixes_a_shard_and_a_file_keeps_it(tmp_path):
    def build(seed, learner=None):
        return collect({"reach": 1.0, "open_drawer": 1.0}, {"normal": 1.0, "varied": 1.0}, 12, 128, (0, seed), learner)

    shard = build(1)
    save_shard(shard, tmp_path / "shard.npz")
    for again in (build(1), load_shard(tmp_path / "shard.npz")):
        assert (again.frames == shard.frames).all() and (again.proprio == shard.proprio).all()
        assert again.questions == shard.questions
    assert shard.frames.shape == (12, 128, 128, 3)
    assert (build(2).proprio != shard.proprio).any()


@pytest.mark.slow
def test_the_learner_moves_the_robot_and_the_oracle_labels_what_it_sees():
    seen = []

    def rise(observation):
        seen.append(observation.proprio[2])
        return Primitive(z=1)

    shard = collect({"reach": 1.0}, {"normal": 1.0}, 150, 128, (0, 3), rise)
    labels = [parse_phrase(asked[0].phrase) for asked in shard.questions]
    lifted = shard.proprio[:, 2] > 0.22  # higher than any episode begins
    assert seen and lifted.sum() > 10
    assert all(label.z == -1 for label, high in zip(labels, lifted, strict=True) if high)


@pytest.mark.slow
def test_a_student_that_has_played_leaves_no_thread_behind(tmp_path):
    write_tiny(tmp_path / "student", seed=0)
    before = set(threading.enumerate())
    spec = RoundSpec(0, {"reach": 1.0}, {"easy": 1.0}, 8, 128, 0, tmp_path / "student")
    collect_round(spec, tmp_path / "shard.npz")
    measured = measure_round(tmp_path / "student", ("reach",), "easy", 1)
    assert set(measured) == {"success reach"}
    assert set(threading.enumerate()) == before


COURSE = {"frames": 8, "steps": 2, "pictures": 3, "learner_from": 2, "warm_rounds": 1, "measure_every": 3}
RECIPE = Recipe(6, warmup_steps=2, log_every=1)


def _train(start, folder, num_rounds, seed=0, recipe=RECIPE, **fields):
    course = Course(num_rounds=num_rounds, measure_episodes=1, **COURSE | fields)
    return SimulatedTraining(start, folder, course, recipe, seed).run()


@pytest.mark.long
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path):
    write_tiny(tmp_path / "start", seed=0)
    whole = _train(tmp_path / "start", tmp_path / "whole", 3)
    half = _train(tmp_path / "start", tmp_path / "killed", 2)
    (half / "model.safetensors").unlink()  # killed after the state was saved, before the student was
    resumed = _train(tmp_path / "start", tmp_path / "killed", 3)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1] != (tmp_path / "start" / "model.safetensors").read_bytes()
    log = (tmp_path / "whole" / "log.jsonl").read_text()
    assert log.count('"answer"') == 6 and '"success reach"' in log
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 1000
    state = (tmp_path / "whole" / "state.pt").read_bytes()
    assert _train(tmp_path / "start", tmp_path / "whole", 3) == whole  # all is done: nothing is collected any more
    for changes, said in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"recipe": replace(RECIPE, learning_rate=0.1)}, "learning_rate was 0.001 and is 0.1"),
        ({"mixes": {0: {"lift": 1.0}}, "frames": 9}, "course.frames was 8 and is 9"),
        ({"start": None}, 'start_sha256 was "'),
    ):
        with pytest.raises(ConfigError, match=said):
            _train(**{"start": tmp_path / "start", "folder": tmp_path / "whole", "num_rounds": 3, **changes})
    assert (tmp_path / "whole" / "state.pt").read_bytes() == state and not (tmp_path / "whole" / "untrained").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["open_drawer", "eggplant_in_sink"])
def test_a_task_without_a_red_thing_is_learnt_from_the_first_round(task, tmp_path):
    write_tiny(tmp_path / "start", seed=0)
    (tmp_path / "start" / "README.md").write_text("The card of other weights.")
    write_sidecar(tmp_path / "start", SIDECAR | {"results": {"level normal": {"reach": {"success": 1.0}}}})
    student = _train(tmp_path / "start", tmp_path / "run", 1, mixes={0: {task: 1.0}})
    assert (student / "model.safetensors").read_bytes() != (tmp_path / "start" / "model.safetensors").read_bytes()
    assert json.loads((student / "vlm_local.json").read_text()) == SIDECAR | {"trained": True}
    assert not (student / "README.md").exists()


@pytest.mark.slow
def test_a_student_of_the_memory_tasks_is_shown_the_first_picture_wherever_it_plays(tmp_path):
    write_tiny(tmp_path / "start", seed=0)
    fields = {"mixes": {0: {"put_back": 1.0}}, "show_first": 0.7, "warm_rounds": 0, "frames": 20}
    student = _train(tmp_path / "start", tmp_path / "run", 3, **fields)  # the last round's frames are of a student
    told = [
        json.loads((folder / "vlm_local.json").read_text())["trained"]
        for folder in sorted(student.parent.glob("student-*"))
    ]
    assert told == [False, False, True]
    assert '"success put_back"' in (tmp_path / "run" / "log.jsonl").read_text()
    with open_student(student) as policy, closing(SimEnv("reach_shown")) as env:
        env.reset(seed=0)
        for shown in ([], [0], [0]):
            assert policy.act(env.observation).extra["frames"] == shown
            env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
