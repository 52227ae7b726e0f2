"""`--env`: environments whose package is missing, and names and tasks that there are not."""

import importlib.util

import pytest

from vlm_local.cli import main


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is not None, reason="Meta-World is installed here")
@pytest.mark.parametrize("command", ["sim", "ceiling"])
def test_meta_world_without_its_package_is_refused_with_the_command_that_installs_it(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([command, "--env", "metaworld", "--out", str(out)]) == 2
    assert ".venv/bin/pip install -e '.[metaworld]'" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--env", "metawrold"), "did you mean"),
        (("--task", "reach-v3"), "task must be one of reach, "),
        (("--level", "cruel"), "level must be one of easy, "),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(arguments, said, tmp_path, capsys):
    assert main(["sim", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
