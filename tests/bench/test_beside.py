import json

import pytest

from vlm_local.cli import main


@pytest.mark.long
def test_two_servers_are_asked_in_turns_and_compared(capsys):
    assert main(["bench", "act", "--beside", "random", "--requests", "5"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["beside"]) == {"local tiny", "local random"}
    assert all(stages["round_trip_ms"]["n"] == 5 for stages in result["beside"].values())
    assert result["round_trip_ratio"] > 0


@pytest.mark.long
def test_both_doors_of_a_server_are_asked_in_turns_and_measured_alike(capsys):
    assert main(["bench", "act", "--model", "stop", "--doors", "--requests", "5"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for stage in ("server_overhead_ms", "round_trip_overhead_ms"):
        assert {door: summary["n"] for door, summary in result[stage].items()} == {"http": 5, "websocket": 5}
    for door, summary in result["round_trip_overhead_ms"].items():
        assert summary["p50"] > result["server_overhead_ms"][door]["p50"] > 0
