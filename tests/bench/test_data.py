import json

from tests import recordings
from vlm_local.cli import main


def test_bench_data_quiet_prints_one_json_object_of_which_a_report_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlm_local.bench.data._ROWS", 200)
    recordings.write_walks(tmp_path / "walks", 1, num_steps=10)
    assert main(["bench", "data", "--data", str(tmp_path / "walks"), "--rounds", "2", "--quiet"]) == 0
    line = capsys.readouterr().out
    result = json.loads(line)
    for name in ("label", "frames", "score"):
        assert result[name]["n"] == 2 and result[name]["steps_per_s"] > 0
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "data.json").write_text(line)
    assert main(["bench", "report", str(tmp_path / "saved")]) == 0
    assert "Measured on" in (tmp_path / "saved.md").read_text()
