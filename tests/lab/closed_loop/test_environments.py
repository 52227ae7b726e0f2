"""`--env`: environments whose package is missing, and names and tasks that there are not."""

import importlib.util

import pytest

from vlm_local.cli import main


@pytest.mark.parametrize(("name", "command"), [("metaworld", "sim"), ("libero", "sim"), ("libero", "ceiling")])
def test_an_environment_without_its_package_is_refused_with_the_command_that_installs_it(
    name, command, tmp_path, capsys
):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    out = tmp_path / "out"
    assert main([command, "--env", name, "--out", str(out)]) == 2
    assert f".venv/bin/pip install -e '.[{name}]'" in capsys.readouterr().err
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
