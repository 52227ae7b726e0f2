import json

import pytest

from vlm_local.cli import main


@pytest.mark.slow
def test_two_servers_are_asked_in_turns_and_compared(capsys):
    assert main(["bench", "act", "--model", "stop", "--beside", "random", "--requests", "5"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["beside"]) == {"local stop", "local random"}
    assert all(stages["round_trip_ms"]["n"] == 5 for stages in result["beside"].values())
    assert result["round_trip_ratio"] > 0
