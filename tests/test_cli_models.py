import pytest

from vlm_local.cli import main
from vlm_local.registry import MODELS


def test_models_prints_every_model_and_where_it_is(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(MODELS)]] == [model.name for model in MODELS]
    (tiny,) = (line for line in lines if line.startswith("tiny "))
    assert tiny.rstrip().endswith("tiny") and " 0.0 M" not in tiny
    (gated,) = (line for line in lines if line.startswith("paligemma "))
    assert "(licence)" in gated and "11.7 GB" in gated
    (mixture,) = (line for line in lines if line.startswith("qwen3-vl-30b-a3b "))
    assert "62.1 GB  -        -" in mixture  # neither 8bit nor 4bit


def test_fetch_prints_the_folder_or_exits_with_2_and_one_paragraph(capsys, tmp_path, monkeypatch):
    assert main(["fetch", "tiny", "--offline"]) == 0
    assert capsys.readouterr().out.strip().endswith("tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("vlm_local.models.find_shipped", lambda name: tmp_path)
    assert main(["fetch", "paligemma", "--offline"]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and "accept its licence" in told and "vlm_local fetch paligemma" in told


@pytest.mark.parametrize("command", ["models", "fetch"])
def test_the_commands_explain_themselves(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and "usage" in capsys.readouterr().out
