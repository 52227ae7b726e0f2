"""What people see of the command line: help, versions, the nearest spelling, -q, completion."""

import json
import re
import subprocess

import pytest

from vlm_local.cli import GROUPS, build_parser, main
from vlm_local.data.runs import RunWriter
from vlm_local.environments.ours import SUITE as OURS
from vlm_local.registry import MODELS


def _say(capsys, *words):
    """(exit status, stdout, stderr) of a command."""
    try:
        status = main(list(words))
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr()
    return status, told.out, told.err


def _list_commands():
    """(words, parser) of every command that runs."""
    return [(words, parser) for words, parser in build_parser().walk() if parser.commands is None]


def test_help_lists_every_command_in_the_order_of_use(capsys):
    status, out, _ = _say(capsys, "--help")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and "-h, " not in line]
    assert status == 0 and listed[1:] == [name for names in GROUPS.values() for name in names]
    assert listed[1] == "serve" and set(listed[1:]) == set(build_parser().commands.choices)


def test_every_command_says_what_it_does(capsys):
    for words, parser in _list_commands():
        assert parser.description and parser.description[-1] in ".:)", words
        assert {"--quiet", "--verbose", "--help"} <= set(parser.list_options())


def test_no_text_of_a_command_is_empty(capsys, tmp_path, monkeypatch):
    """As "$UNSET" in a script is: `sim --task ''` played the first task, `--out ''` wrote into this folder."""
    monkeypatch.chdir(tmp_path)
    empty = [["replay", ""], ["sim", "--task", " "]]
    for words, parser in _list_commands():
        for name, action in parser.list_options().items():
            if action.nargs != 0 and name.startswith("--"):
                empty.append([*words, name, ""])
    assert ["sim", "--task", ""] in empty and ["train", "finetune", "--out", ""] in empty and len(empty) > 200
    for words in empty:
        status, _, error = _say(capsys, *words)
        assert status == 2 and re.search("is empty|must be a|there is no ''|expected", error), (words, error)
    assert list(tmp_path.iterdir()) == []


def test_names_in_a_list_may_have_blanks_around_them():
    assert OURS.choose("reach , push,reach") == ("reach", "push")


def test_the_policy_options_stand_in_one_group(capsys):
    for command in ("serve", "sim", "eval", "spatial", "replay"):
        out = _say(capsys, command, "--help")[1]
        group = out.partition("\npolicy:")[2].partition("\n\n")[2].partition("\n\n")[0]
        assert {"--engine", "--quantize", "--grammar", "--deadline-ms"} <= set(group.split()), command


def test_the_version_names_what_answers_depend_on(capsys):
    status, out, _ = _say(capsys, "--version")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["vlm_local", "python", "torch", "transformers", "device"]


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["evl"], "eval"),
        (["serve", "--modle", "x"], "--model"),
        (["serve", "--tokenfile=x"], "--token-file"),
        (["sim", "--model", "x"], "--policy"),
        (["serve", "--policy", "x"], "--model"),
        (["bench", "deocde"], "decode"),
        (["bench", "act", "--client", "1", "--round-trips", "1"], "--rounds"),
        (["serve", "--engine", "opneai"], "openai"),
        (["sim", "--policy", "stop", "--task", "open_draw"], "open_drawer"),
        (["sim", "--policy", "stop", "--level", "normla"], "normal"),
        (["replay", "RUN", "--policy", "Qwen2-LV"], "qwen2-vl"),
        (["replay", "RUN", "--policy", "Stop"], "stop"),
        (["replay", "RUN", "--policy", "stop", "--embodiment", "Auto"], "auto"),
        (["serve", "--embodiment", "autoeval-widwox"], "autoeval-widowx"),
        (["replay", "RUN", "--policy", "stop", "--grammar", "primitve"], "primitives"),
        (["replay", "RUN", "--policy", "stop", "--prompt", "chta"], "chat"),
        (["serve", "--workspace", "autoeval-drawr"], "autoeval-drawer"),
    ],
)
def test_the_nearest_spelling_is_named(words, nearest, tmp_path, capsys):
    (tmp_path / "episodes").mkdir()
    status, _, error = _say(capsys, *(str(tmp_path) if word == "RUN" else word for word in words))
    assert status == 2 and f"did you mean {nearest}?" in error
    assert len(error.splitlines()) <= 2


def test_an_oracle_where_there_is_none_is_told_where_it_plays(capsys):
    for words in (("sim", "--policy", "Oracle", "--task", "reach"), ("serve", "--model", "oracle")):
        assert "`sim --policy oracle`" in _say(capsys, *words)[2]


def test_a_word_that_resembles_nothing_gets_the_list(capsys):
    error = _say(capsys, "serve", "--engine", "zzz")[2]
    assert "choose from local, openai" in error and "did you mean" not in error
    assert all(model.name in _say(capsys, "fetch", "zzz")[2] for model in MODELS)


@pytest.fixture
def run(tmp_path):
    writer = RunWriter(tmp_path / "run", {"model": "tiny"})
    writer.start_episode("robot")
    for step in range(3):
        writer.add_step({"robot": "robot", "step": step, "instruction": "go", "phrase": "stop"}, None)
    writer.close()
    return tmp_path / "run"


def test_a_result_is_a_table_and_one_line_of_json_and_quiet_leaves_the_line(tmp_path, capsys):
    from tests import recordings

    recordings.write_walks(tmp_path / "data", 1, num_steps=9)
    words = ["label", str(tmp_path / "data"), "--out", str(tmp_path / "labels.jsonl")]
    status, out, _ = _say(capsys, *words)
    *table, last = out.splitlines()
    assert status == 0 and "steps of 1 episodes labelled" in table[0]
    assert json.loads(last)["episodes"] == 1 and json.loads(last)["out"] == words[-1]
    assert _say(capsys, *words, "-q")[1].splitlines() == [last]


def test_quiet_leaves_the_line_of_commands_that_also_say_what_they_do(run, capsys):
    status, out, _ = _say(capsys, "replay", str(run), "--policy", "stop")
    assert status == 0 and "first divergence: step 0" in out
    assert _say(capsys, "replay", str(run), "--policy", "stop", "-q")[1].splitlines() == out.splitlines()[-1:]


def test_doctor_ends_with_what_it_found(capsys):
    status, out, _ = _say(capsys, "doctor", "http://127.0.0.1:9", "-q")
    *shown, last = out.splitlines()
    assert status == 1 and json.loads(last)["failed"] == len(shown) == 1


COMPLETE = """
source <(echo "$SCRIPT")
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _vlm_local; echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("vlm-local se", "serve"),
        ("vlm-local train ", "finetune detector tiny mean init-tiny"),
        ("vlm-local serve --engine-", "--engine-url"),
        ("vlm-local serve --engine ", "local openai"),
        ("vlm-local train finetune --lo", "--lora"),
        ("vlm-local eval --data fol", ""),
    ],
)
def test_bash_completes(line, completed, capsys):
    script = _say(capsys, "completion", "bash")[1]
    command = ["bash", "-c", COMPLETE, "bash", *line.split(" ")]
    done = subprocess.run(command, capture_output=True, text=True, env={"SCRIPT": script, "PATH": "/bin:/usr/bin"})
    assert done.stdout.strip().replace("-h --help", "").strip() == completed and not done.stderr
