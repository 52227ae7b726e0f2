"""Rates, intervals and what is left out of them."""

import pytest

from vlm_local.lab.closed_loop.scores import score_run


def episode(outcome, steps, stage, oracle_steps=10):
    return {"task": "t", "outcome": outcome, "steps": steps, "stage": stage, "agreed": steps // 2,
            "oracle_steps": oracle_steps, "random_steps": None}  # fmt: skip


def test_scores():
    episodes = [
        episode("success", 20, 2),
        episode("success", 80, 2),
        episode("late", 120, 1),
        episode("lost", 30, 0),
        episode("faulted", 3, 0),
    ]
    scores = score_run(episodes, {"t": ("reached", "done")})
    score = scores["tasks"]["t"]
    assert scores["success_rate"] == {"t": 0.5} and scores["success_rate_70"] == {"t": 0.25}
    assert (scores["episodes"], scores["faulted"]) == (5, 1)
    assert score["success"]["n"] == 4 and score["lost"] == 1
    assert score["reached"] == {"reached": 3, "done": 2}
    assert score["steps"] == 50 and score["efficiency"] == pytest.approx((0.5 + 0.125) / 2)
    assert score["agreement"] == 0.5


def test_a_task_without_episodes_has_no_rate():
    assert score_run([], {"t": ("done",)})["success_rate"] == {"t": None}
