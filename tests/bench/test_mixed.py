import json
from collections import Counter

import pytest

from vlm_local.bench.mixed import MixedSettings, judge, measure
from vlm_local.bench.rough_robot import Diary
from vlm_local.policy_options import PolicyOptions

SETTINGS = MixedSettings(robots=2, seconds=1.5, rounds=1, hz=4)


@pytest.mark.long
def test_robots_beside_everybody_else_lose_nothing():
    result = measure(PolicyOptions(model="random"), SETTINGS)
    assert result["lost"] == {"alone": 0, "mixed": 0, "elsewhere": 0} and result["latency_ms"]["mixed"]["n"] > 0
    assert all("p95" in what for what in result["violations"])  # which says nothing in a second and a half
    kinds = {answer.partition(":")[0] for answer in result["strangers"]}
    assert {"rubbish", "large bodies", "questions", "tries", "pages"} <= kinds
    json.dumps(result)


def _write_diary(*latencies_ms: float, refused: int = 0) -> Diary:
    counts = Counter(act=len(latencies_ms) + refused)
    return Diary(counts=counts, latencies_ms=list(latencies_ms), refusals=Counter(busy=refused))


def test_what_is_lost_late_or_failed_is_named():
    alone = {"alone": [_write_diary(10.0, 20.0)], "elsewhere": [_write_diary(13.0, 26.0)]}
    assert judge(SETTINGS, {**alone, "mixed": [_write_diary(14.0, 28.0)]}, Counter({"pages: 503": 3}), 0)["passed"]
    for mixed, strangers, status, violation in (
        (_write_diary(10.0, refused=1), {}, 0, "1 requests of robots lost, mixed"),
        (_write_diary(20.0, 40.0), {}, 0, "p95 is 2.00 times that of the robots alone; 1.30 times where"),
        (_write_diary(), {}, 0, "p95 is inf times"),
        (_write_diary(10.0), {"pages: 500": 1}, 0, "strangers got pages: 500"),
        (_write_diary(10.0), {}, 3, "ended with status 3"),
    ):
        result = judge(SETTINGS, {**alone, "mixed": [mixed]}, Counter(strangers), status)
        assert not result["passed"] and any(violation in what for what in result["violations"]), violation
        json.dumps(result, allow_nan=False)  # a ratio to nothing is no number that JSON has
