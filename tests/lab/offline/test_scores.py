import time
from dataclasses import replace

import numpy as np
import pytest

from vlm_local.engines.scripted import build_uniform_engine
from vlm_local.grammar import load_phrase_grammar
from vlm_local.lab.offline.baselines import answer_baseline, derive_episode_seed, find_majority
from vlm_local.lab.offline.rows import build_rows
from vlm_local.lab.offline.scores import MIN_STEPS, score_rows
from vlm_local.policy import Settings, VLMPolicy
from vlm_local.primitives import list_phrases
from vlm_local.prompts import load_template
from vlm_local.types import AXES, Observation


def _row(episode, step, label, phrase, **fields):
    return {
        "episode": episode,
        "step": step,
        "instruction": "lift the cup",
        "label": label,
        "previous_label": None,
        "phrase": phrase,
        "full_window": True,
        "phrase_source": "phrase",
        **fields,
    }


def _score(pairs, **fields):
    return score_rows(build_rows([_row(0, step, *pair, **fields) for step, pair in enumerate(pairs)]))


def test_exact_is_over_all_labelled_steps_and_a_missing_answer_is_wrong():
    report = _score([("move up", "move up"), ("move up", "move down"), ("stop", None), ("stop", "stop")])
    assert report["exact"] == 0.5
    assert (report["steps"], report["unanswered"], report["counts"]["three_axis"]) == (4, 1, 3)


def test_axis_scores_worked_out_by_hand():
    said = ["move left"] * 12 + ["move right"] * 6 + ["stop"] * 2
    pairs = list(zip(["move left"] * 10 + ["move right"] * 10, said, strict=True))
    axis = _score(pairs)["axes"]["y"]
    assert axis["confusion"] == [[6, 2, 2], [0, 0, 0], [0, 0, 10]]
    assert axis["accuracy"] == 16 / 20
    assert axis["opposite"] == 2 / 20
    # right: precision 6/6, recall 6/10; none: never a label, said twice; left: precision 10/12, recall 10/10.
    assert axis["macro_f1"] == pytest.approx((2 * 6 / 16 + 0 + 2 * 10 / 22) / 3)


def test_a_score_with_too_few_steps_is_none_and_says_how_many():
    report = _score([("move left", "move left")] * (MIN_STEPS - 1) + [("stop", "stop")] * MIN_STEPS)
    assert report["axes"]["y"]["macro_f1"] is None
    assert report["counts"]["axes.y.macro_f1"] == MIN_STEPS - 1
    assert report["moving"]["exact"] is None and report["still"]["exact"] == 1
    assert "moving.exact" not in report["intervals"]


def test_splits_and_three_axis_answers():
    pairs = [("move up", "move forward left up")] * 10 + [("stop", "stop")] * 30
    rows = build_rows([_row(0, step, *pair, full_window=step < 20) for step, pair in enumerate(pairs)])
    report = score_rows(rows)
    assert report["three_axis"] == 0.25
    assert (report["moving"]["exact"], report["still"]["exact"]) == (0, 1)
    assert (report["full_window"]["exact"], report["short_window"]["exact"]) == (0.5, 1)


def _gripper(labels: str, answers: str):
    words = {"o": "open gripper", "c": "close gripper", ".": "stop"}
    return [(words[label], words[answer]) for label, answer in zip(labels, answers, strict=True)]


def test_gripper_events_are_matched_once_and_within_the_tolerance():
    labels_a, answers_a = "....ccc...ooo...", ".cc...........o."  # close 3 early: found; open 4 late: missed
    labels_b, answers_b = "....ccc.........", "...c.c.........c"  # two answers for one event, one far away
    rows = [_row(0, step, *pair) for step, pair in enumerate(_gripper(labels_a, answers_a))]
    rows += [_row(1, step, *pair) for step, pair in enumerate(_gripper(labels_b, answers_b))]
    rows += [_row(2, 6 * step, *pair) for step, pair in enumerate(_gripper("c." * 7, "c." * 7))]
    report = score_rows(build_rows(rows))
    assert report["counts"]["gripper_events.recall"] == 2 + 1 + 7
    assert report["gripper_events"]["recall"] == 9 / 10
    assert report["gripper_events"]["precision"] == 9 / (2 + 3 + 7)


def test_actions_are_scored_as_mse_check_does():
    random = np.random.default_rng(0)
    ours, recorded = random.normal(size=(2, 12, 7))
    rows = [
        _row(step // 6, step % 6, "stop", "stop", action=ours[step].tolist(), recorded_action=recorded[step].tolist())
        for step in range(12)
    ]
    scores = score_rows(build_rows(rows))["actions"]
    for name, width in (("", 7), ("_without_gripper", 6)):
        a, b = ours[:, :width].reshape(2, -1), recorded[:, :width].reshape(2, -1)
        assert scores[f"mse{name}"] == pytest.approx(((a - b) ** 2).mean())
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert scores[f"cosine{name}"] == pytest.approx(cosine.mean())


def test_calibration_worked_out_by_hand():
    marginals = {axis: [0.1, 0.6, 0.3] for axis in AXES}
    rows = [_row(0, step, "stop" if step < 9 else "move up", "stop", probability=0.75) for step in range(12)]
    rows += [_row(0, 12 + step, "stop", "stop", probability=1.0, marginals=marginals) for step in range(12)]
    report = score_rows(build_rows(rows))
    phrase = report["calibration"]["phrase"]
    assert phrase["ece"] == pytest.approx(0)  # 9 of 12 at 0.75, 12 of 12 at 1
    assert phrase["brier"] == pytest.approx((9 * 0.25**2 + 3 * 0.75**2) / 24)
    assert report["calibration"]["x"]["ece"] == pytest.approx(0.4)
    assert report["counts"]["calibration.x.ece"] == 12


def test_without_probabilities_and_actions_those_scores_are_none():
    report = _score([("stop", "stop")] * 20)
    assert report["calibration"]["phrase"] == {"ece": None, "brier": None}
    assert set(report["actions"].values()) == {None}


def test_intervals_are_by_episode_and_repeat_with_the_seed():
    # Steps of an episode are all right or all wrong: 400 steps, but only 20 independent ones.
    rows = [_row(e, s, "stop", "stop" if e % 2 else "move up") for e in range(20) for s in range(20)]
    report = score_rows(build_rows(rows))
    low, high = report["intervals"]["exact"]
    assert 0.25 <= low <= 0.35 and 0.65 <= high <= 0.75
    assert score_rows(build_rows(rows)) == report
    assert _score([("stop", "stop")] * 20)["intervals"] == {}, "one episode says nothing about others"


def test_baselines_stand_beside_the_model():
    labels = ["stop"] * 3 + ["move up"] * 5 + ["stop"] * 4
    rows = []
    for episode in range(4):
        for step, label in enumerate(labels):
            rows.append(_row(episode, step, label, "move up", previous_label=labels[step - 1] if step else None))
    baselines = score_rows(build_rows(rows))["baselines"]
    assert baselines["majority"]["phrase"] == "stop" and baselines["majority"]["exact"] == 7 / 12
    assert baselines["repeat_last"]["exact"] == 10 / 12
    assert baselines["oracle_label"]["exact"] == 1
    assert baselines["random"]["exact"] < 0.1
    lead = baselines["majority"]["lead"]
    assert lead["difference"] == pytest.approx(5 / 12 - 7 / 12)
    assert lead["p_value"] == pytest.approx(2 / 2**4)


def test_random_is_what_a_server_with_policy_random_says():
    engine = build_uniform_engine()
    policy = VLMPolicy(
        lambda request: engine.generate([request])[0],
        load_phrase_grammar(),
        load_template("chat"),
        Settings(decide="sample"),
    )
    policy.reset(derive_episode_seed(seed=3, episode=5))
    observation = Observation(np.zeros((32, 32, 3), np.uint8), "lift the cup")
    said = [policy.act(replace(observation, step=step)).phrase for step in range(50)]
    steps = [(5, step) for step in range(50)]
    assert answer_baseline("random", steps, [], [], "stop", seed=3) == said


def test_majority_is_the_commonest_label():
    assert find_majority(["a", "b", "b", "a", "c"]) == "a"
    assert find_majority([]) == "stop"


def test_scoring_is_fast_enough_for_big_data_sets():
    random = np.random.default_rng(0)
    phrases = list_phrases()
    rows = [
        _row(
            step // 40, step % 40, phrases[a], phrases[b], probability=0.5, action=[0.0] * 7, recorded_action=[0.1] * 7
        )
        for step, (a, b) in enumerate(random.integers(0, 729, (4000, 2)))
    ]
    start = time.process_time()
    score_rows(build_rows(rows))
    assert 4000 / (time.process_time() - start) > 2000  # of the processor's time; `bench data` has it by the clock
