import json
import math
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest

from tests import recordings
from vlm_local.data import open_episodes
from vlm_local.errors import ConfigError, DataError, EngineError
from vlm_local.lab.offline.answers import PolicyAnswerer
from vlm_local.lab.offline.rows import RowWriter
from vlm_local.lab.offline.run import EvaluationPlan, answer_episodes, evaluate
from vlm_local.primitives import format_phrase, label_episode
from vlm_local.types import Decision


class ScriptedPolicy:
    """Says what `say(step, observation)` gives; remembers its observations."""

    def __init__(self, say):
        self.metadata = {"model": "scripted", "trained": True}
        self._say = say
        self.seeds, self.observations = [], []

    def reset(self, seed):
        self.seeds.append(seed)
        self._step = 0

    def act(self, observation):
        self.observations.append(observation)
        step, self._step = self._step, self._step + 1
        return self._say(step, observation)


def _phrase(phrase, **fields):
    return Decision(np.zeros(7), phrase, **fields)


@pytest.fixture
def data_set(tmp_path):
    folder = tmp_path / "data"
    recordings.write_walks(folder, 3, num_steps=12)
    return folder


def _run(data_set, out, policies, every=1):
    out.mkdir(exist_ok=True)
    writer = RowWriter(out)
    answerers = [PolicyAnswerer(policy, seed=0) for policy in policies]
    try:
        answer_episodes(open_episodes(data_set, report=lambda error: None), lambda: answerers, writer, every)
    finally:
        writer.close()
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()], writer.episodes


def test_a_row_holds_what_was_asked_and_answered(data_set, tmp_path):
    marginals = {"x": (0.1, 0.2, 0.7)}
    policy = ScriptedPolicy(lambda step, _: _phrase("move up", probability=0.5, margin=0.25, marginals=marginals))
    rows, episodes = _run(data_set, tmp_path / "out", [policy])
    labels = [format_phrase(label) for label in label_episode(recordings.make_states(12, 1))[0]]
    assert [(row["episode"], row["step"]) for row in rows] == [(e, s) for e in range(3) for s in range(12)]
    row = rows[12 + 5]
    assert row["label"] == labels[5] and row["previous_label"] == labels[4] and rows[12]["previous_label"] is None
    assert row["phrase"] == "move up" and row["phrase_source"] == "phrase" and row["full_window"] is True
    assert (row["probability"], row["margin"], row["marginals"]) == (0.5, 0.25, {"x": [0.1, 0.2, 0.7]})
    assert row["action"] == [0] * 7 and len(row["recorded_action"]) == 7
    observation = policy.observations[12 + 5]
    np.testing.assert_array_equal(observation.image, recordings.make_images(12)[5])
    np.testing.assert_array_equal(observation.proprio, recordings.make_states(12, 1)[5])
    assert len(set(policy.seeds)) == 3
    assert episodes == [{"episode": episode, "steps": 12, "unscored": {}} for episode in range(3)]


def test_every_nth_step_is_asked(data_set, tmp_path):
    rows, _ = _run(data_set, tmp_path / "out", [ScriptedPolicy(lambda *_: _phrase("stop"))], every=5)
    assert [row["step"] for row in rows] == [0, 5, 10] * 3


def test_workers_give_the_same_rows(data_set, tmp_path):
    def slow(step, observation):
        time.sleep(0.002 * (observation.proprio[0] % 0.01 > 0.005))
        return _phrase("move up" if observation.proprio[2] > 0.15 else "stop")

    alone, _ = _run(data_set, tmp_path / "one", [ScriptedPolicy(slow)])
    together, _ = _run(data_set, tmp_path / "three", [ScriptedPolicy(slow) for _ in range(3)])
    assert together == alone


def test_a_policy_that_only_acts_is_scored_by_its_actions(data_set, tmp_path):
    """Carrying out the recorded motion must give the recorded labels, whatever steps are scored."""
    states = [recordings.make_states(12, seed).astype(np.float64) for seed in range(3)]

    def act(step, observation):
        (track,) = [track for track in states if (np.abs(track - observation.proprio).max(axis=1) < 1e-6).any()]
        at = int(np.abs(track - observation.proprio).max(axis=1).argmin())
        after = track[min(at + 1, len(track) - 1)]
        return Decision(np.append(after[:6] - track[at][:6], after[6]))

    for every in (1, 4):
        rows, _ = _run(data_set, tmp_path / str(every), [ScriptedPolicy(act)], every)
        assert [row["step"] for row in rows] == [*range(0, 12, every)] * 3
        assert {row["phrase_source"] for row in rows} == {"actions"}
        assert [row["phrase"] for row in rows] == [row["label"] for row in rows]


def test_a_failing_policy_has_no_answer_and_the_rest_is_scored(data_set, tmp_path):
    def say(step, observation):
        if step == 3:
            raise EngineError("out of memory")
        return _phrase("stop", fault="too late" if step == 5 else None)

    rows, _ = _run(data_set, tmp_path / "out", [ScriptedPolicy(say)])
    assert len(rows) == 36
    assert [(row["step"], row["fault"]) for row in rows[:12] if row["phrase"] is None] == [
        (3, "out of memory"),
        (5, "too late"),
    ]


@pytest.mark.parametrize("every", [1, 3])
def test_a_policy_that_only_acts_has_one_row_a_step_also_where_its_first_answers_fail(data_set, tmp_path, every):
    asked = 0

    def act(step, observation):
        nonlocal asked
        asked += 1
        if asked <= 2:
            raise EngineError("still loading")
        return Decision(np.array([0, 0.02, 0, 0, 0, 0, 0.0]))

    rows, _ = _run(data_set, tmp_path / "out", [ScriptedPolicy(act)], every)
    assert [(row["episode"], row["step"]) for row in rows] == [(e, s) for e in range(3) for s in range(0, 12, every)]
    assert {row["phrase_source"] for row in rows} == {"actions"}
    assert rows[0]["fault"] == "still loading" and rows[0]["phrase"] is None
    assert rows[12 // every + 1]["phrase"] == "move left"


def test_a_policy_that_stops_saying_phrases_has_faults_and_no_second_row(data_set, tmp_path):
    silent = ScriptedPolicy(lambda step, _: Decision(np.zeros(7)) if step == 5 else _phrase("stop"))
    rows, _ = _run(data_set, tmp_path / "out", [silent])
    assert len(rows) == 36 and {row["phrase_source"] for row in rows} == {"phrase"}
    assert "said no phrase" in rows[5]["fault"] and rows[6]["phrase"] == "stop"


def test_a_broken_policy_ends_the_evaluation_and_the_next_run_completes_it(data_set, tmp_path):
    asked = 0

    def say(step, observation):
        nonlocal asked
        asked += 1
        if asked > 20:
            raise EngineError("connection refused")
        return _phrase("stop")

    with pytest.raises(EngineError, match=r"3 times in a row.*connection refused.*goes on"):
        _run(data_set, tmp_path / "out", [ScriptedPolicy(say)])
    healthy = ScriptedPolicy(lambda *_: _phrase("stop"))
    resumed, _ = _run(data_set, tmp_path / "out", [healthy])
    assert len(healthy.observations) == 24, "the finished episode is not asked again, the broken one is"
    assert resumed == _run(data_set, tmp_path / "whole", [ScriptedPolicy(lambda *_: _phrase("stop"))])[0]


def test_what_cannot_be_scored_is_counted_with_its_reason(tmp_path):
    good, gray = recordings.make_images(6), np.zeros((32, 32), np.uint8)
    images = [recordings.encode_image(image) for image in (*good[:2], gray, *good[3:])]
    states = recordings.make_states(6)
    recordings.write_rlds(
        tmp_path / "data",
        [
            recordings.make_rlds_record(states, images=images),
            recordings.make_rlds_record(states, instruction=" "),
            recordings.make_rlds_record(states[:1]),
        ],
    )
    rows, episodes = _run(tmp_path / "data", tmp_path / "out", [ScriptedPolicy(lambda *_: _phrase("stop"))])
    assert [row["step"] for row in rows] == [0, 1, 3, 4, 5]
    assert "RGB image was expected" in episodes[0]["unscored"][2]
    assert "no instruction" in episodes[1]["left_out"] and "1 step(s)" in episodes[2]["left_out"]


EVALUATE = """
import itertools, sys, time
import numpy as np
from pathlib import Path
from vlm_local.data import open_episodes
from vlm_local.lab.offline.run import EvaluationPlan, evaluate
from vlm_local.types import Decision

acts = itertools.count(1)

class Policy:
    metadata = {}
    max_workers = 2
    def reset(self, seed):
        self.random = np.random.default_rng(seed)
    def act(self, observation):
        number = next(acts)
        if "--until-killed" in sys.argv and number > 15:
            if number == 16:
                print("kill me", flush=True)
            time.sleep(60)
        return Decision(self.random.normal(size=7), ["stop", "move up"][self.random.integers(2)], probability=0.5)
    def build(self, robot):
        return Policy()
    def close(self):
        pass

data, out = sys.argv[1:3]
evaluate(EvaluationPlan("policy", "data"), Path(out), lambda report: open_episodes(data, report=report), Policy,
         workers=2)
"""


@pytest.mark.long
def test_a_killed_evaluation_goes_on_without_losing_or_doubling_a_row(data_set, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-c", EVALUATE, str(data_set)]
    subprocess.run([*command, str(whole)], check=True)
    for _ in range(2):
        with subprocess.Popen([*command, str(broken), "--until-killed"], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"kill me\n"
            process.kill()
    assert 0 < len((broken / "rows.jsonl").read_bytes()) < len((whole / "rows.jsonl").read_bytes())
    with (broken / "rows.jsonl").open("a") as file:
        file.write('{"episode": 2, "st')  # the kill came within a line
    subprocess.run([*command, str(broken)], check=True)
    assert (broken / "rows.jsonl").read_bytes() == (whole / "rows.jsonl").read_bytes()


def _evaluate(data_set, out, name, **changes):
    return evaluate(
        EvaluationPlan(name, "data", **changes),
        out,
        lambda report: islice(open_episodes(data_set, report=report), changes.get("limit")),
        lambda: pytest.fail("a baseline asks no model"),
    )


@pytest.mark.parametrize("name", ["majority", "repeat-last", "random", "oracle-label"])
def test_a_baseline_scores_as_the_report_of_any_policy_says(data_set, tmp_path, name):
    report = _evaluate(data_set, tmp_path / name, name, every=2)
    baseline = report["baselines"][name.replace("-", "_")]
    assert report["exact"] == baseline["exact"]
    assert baseline["lead"]["difference"] == 0 and baseline["lead"]["p_value"] == 1


def test_going_on_with_other_settings_is_refused(data_set, tmp_path):
    _evaluate(data_set, tmp_path / "out", "oracle-label")
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        _evaluate(data_set, tmp_path / "out", "oracle-label", seed=1)
    again = _evaluate(data_set, tmp_path / "out", "oracle-label")
    assert again["exact"] == 1 and again["steps"] == 36
    _evaluate(data_set, tmp_path / "common", "majority", limit=1)
    with pytest.raises(ConfigError, match="limit was 1 and is 2"):  # of which another phrase may be the commonest
        _evaluate(data_set, tmp_path / "common", "majority", limit=2)


def test_rows_of_two_checkpoints_are_never_mixed(data_set, tmp_path):
    class Source(ScriptedPolicy):
        def __init__(self, sha256, fails):
            num_good = 20 if fails else math.inf
            super().__init__(lambda *_: _phrase("stop", fault="broken" if len(self.observations) > num_good else None))
            self.metadata = {"checkpoint_sha256": sha256}
            self.max_workers = 1

        def build(self, robot):
            return self

        def close(self):
            pass

    def run(source):
        def open_data(report):
            return open_episodes(data_set, report=report)

        return evaluate(EvaluationPlan("mine", "data"), tmp_path / "out", open_data, lambda: source)

    with pytest.raises(EngineError, match="broken"):
        run(Source("aaa", fails=True))
    with pytest.raises(ConfigError, match='checkpoint_sha256 was "aaa" and is "bbb"'):
        run(Source("bbb", fails=False))
    assert run(Source("aaa", fails=False))["steps"] == 36


def test_data_without_a_single_label_is_an_error(tmp_path):
    recordings.write_walks(tmp_path / "data", 1, num_steps=1)
    with pytest.raises(DataError, match="no step could be scored"):
        _evaluate(tmp_path / "data", tmp_path / "out", "majority")
