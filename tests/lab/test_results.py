"""The result folder of a study: who may write into it, how it goes on, and which of its files are evidence."""

import json

import pytest

from vlm_local.errors import ConfigError, DataError
from vlm_local.lab.results import LAYOUTS, ResultFolder, RowFile, find_layout


def _begin(path, here, has_results, grows=()):
    """The settings file of a study whose seed alone may not change."""
    with ResultFolder(path, "eval", "evaluation.json") as folder:
        folder.begin(here, lambda settings: {"seed": settings["seed"]}, has_results, grows)
    return json.loads((path / "evaluation.json").read_text())


def test_a_folder_without_results_takes_any_settings_and_one_with_results_its_own(tmp_path):
    _begin(tmp_path, {"seed": 1, "episodes": 3, "plan": "a"}, False)
    with ResultFolder(tmp_path, "eval", "evaluation.json") as folder:
        folder.begin({"seed": 1}, dict, False)
        folder.update(left_out=2)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == folder.settings == {"seed": 1, "left_out": 2}
    begun = {"seed": 2, "episodes": 3, "plan": "a"}
    assert _begin(tmp_path, begun, False) == begun
    with pytest.raises(ConfigError, match="other settings: seed was 2 and is 3; choose"):
        _begin(tmp_path, {**begun, "seed": 3}, True)
    assert _begin(tmp_path, {**begun, "episodes": 9, "plan": "b"}, True, ("episodes",)) == {**begun, "episodes": 9}
    for text in ("[]", "{", '{"plan": "a"}'):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(ConfigError, match="is of no result of `eval`"):
            _begin(tmp_path, begun, True)


def test_what_a_kill_left_before_the_settings_is_no_result(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "evaluation.json.new").write_text('{"seed"')
    _begin(tmp_path, {"seed": 1}, False)
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "rows.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        _begin(tmp_path, {"seed": 1}, False)


def test_an_error_before_the_first_result_leaves_no_folder_and_one_of_the_disk_is_told(tmp_path):
    with (
        pytest.raises(DataError, match=r"No space.*goes on once it is mended"),
        ResultFolder(tmp_path / "a/b", "eval", "evaluation.json"),
    ):
        raise OSError(28, "No space left on device")
    assert not (tmp_path / "a").exists()
    held = ResultFolder(tmp_path / "a", "eval", "evaluation.json")
    with held, pytest.raises(ConfigError, match="in use"):
        ResultFolder(tmp_path / "a", "eval", "evaluation.json")
    _begin(tmp_path / "a", {"seed": 1}, False)  # it is free again


def test_rows_are_there_at_once_and_half_a_row_is_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = '{"step": 2}\n{"step": 1}\n'
    for before in (whole + '{"st', whole + '{"step": 3}\n', whole):
        path.write_text(before)
        file = RowFile(path, lambda row: row["step"] != 3)
        assert file.rows == [{"step": 2}, {"step": 1}] and path.read_text() == whole
    file.add({"step": 0})
    assert path.read_text().splitlines() == ['{"step": 2}', '{"step": 1}', '{"step": 0}']
    file.close()
    file.sort(lambda row: row["step"])
    assert path.read_text().splitlines() == ['{"step": 0}', '{"step": 1}', '{"step": 2}']
    for line in ("[]", "nothing", "{}"):
        path.write_text(f'{line}\n{{"step": 1}}\n')
        with pytest.raises(DataError, match="something else changed the file"):
            RowFile(path, lambda row: row["step"] != 3)


def test_a_result_is_known_by_its_files_and_holds_no_others(tmp_path):
    kinds = LAYOUTS["eval"], LAYOUTS["sim"]
    assert [layout.holds("rows.jsonl") for layout in kinds] == [True, False]
    assert [layout.holds("episodes/lift-1/frames/000001.png") for layout in kinds] == [False, True]
    assert kinds[1].is_picture("episodes/lift-1/film.mp4") and not kinds[1].is_picture("report.json")
    for name in ("report.json.bak", "../report.json", "a/report.json", "episodes/../meta.json", "report.json\n"):
        assert not any(layout.holds(name) for layout in kinds)
    (tmp_path / "evaluation.json").write_text('{"plan": {}}')
    with pytest.raises(DataError, match=r"without episodes\.jsonl, rows\.jsonl, report\.json; finish it"):
        find_layout(tmp_path)
    for name in ("episodes.jsonl", "rows.jsonl", "report.json"):
        (tmp_path / name).touch()
    assert find_layout(tmp_path).kind == "eval"
    for folder, wanted in ((tmp_path, ("sim",)), (tmp_path / "none", ("eval",))):
        with pytest.raises(DataError, match="is no result folder"):
            find_layout(folder, wanted)
