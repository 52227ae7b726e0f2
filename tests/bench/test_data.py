import json

from tests import recordings
from vlm_local.cli import main


def test_bench_data_quiet_prints_one_json_object_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlm_local.bench.data._ROWS", 200)
    recordings.write_walks(tmp_path, 1, num_steps=10)
    assert main(["bench", "data", "--data", str(tmp_path), "--rounds", "2", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("label", "frames", "score"):
        assert result[name]["n"] == 2 and result[name]["steps_per_s"] > 0
