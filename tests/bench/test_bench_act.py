import json

import pytest

from vlm_local.cli import main


@pytest.mark.slow
def test_it_measures_a_real_server_and_ends_in_one_json_object(capsys):
    flags = ["--model", "stop", "--requests", "10", "--clients", "1,2", "--seconds", "0.5", "--rounds", "1"]
    assert main(["bench", "act", *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    overhead = result["server_overhead_ms"]
    assert 0 < overhead["p50"] <= overhead["p95"] and overhead["n"] == 10
    assert result["round_trip_overhead_ms"]["p50"] > overhead["p50"]
    for name in ("requests_per_s", "times_the_first", "server_cpu_ms_per_request"):
        assert set(result[name]) == {"1", "2"} and min(result[name].values()) > 0
    assert result["times_the_first"]["1"] == 1
    assert result["model"] == "stop" and result["start_up_s"] > 0 and "cores" in result["machine"]


def test_a_server_that_does_not_start_is_a_paragraph(capsys):
    assert main(["bench", "act", "--model", "stop", "--grammar", "nowhere"]) == 2
    assert "did not start" in capsys.readouterr().err
