"""Numbers on the command line: none that a command cannot mean gets past the parser."""

import argparse
from pathlib import Path

import pytest

from vlm_local.cli import build_parser, main

NONSENSE = ["-1", "nan", "inf", "-inf", "1e999", "9" * 40, "9" * 5000, "", "many"]


def list_options(parser, words=()):
    """(words of the command, option) of every option of every command that takes something else than text or a path."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from list_options(below, (*words, word))
        elif (
            action.type not in (None, str, Path) or str(action.metavar or "").startswith("N,") or action.metavar == "N"
        ):
            yield words, action.option_strings[0]


PARSER = build_parser()
OPTIONS = list(list_options(PARSER))


def test_the_options_that_take_numbers_are_found():
    assert len(OPTIONS) > 60
    assert {(("sim",), "--workers"), (("serve",), "--port"), (("train", "tiny"), "--rounds")} <= set(OPTIONS)


@pytest.mark.parametrize(("words", "option"), OPTIONS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_number_that_makes_no_sense_is_refused_with_what_is_expected(words, option, capsys):
    for value in NONSENSE:
        with pytest.raises(SystemExit) as end:
            PARSER.parse_args([*words, f"{option}={value}"])
        error = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2
        assert f"argument {option}: must be a" in error and " to " in error and len(error) < 150


@pytest.mark.parametrize(
    "command",
    [
        "sim --workers 0",
        "sim --episodes 0",
        "sim --max-steps 0",
        "sim --noise 1.01",
        "ceiling --workers 0",
        "ceiling --episodes 0",
        "spatial --scenes 1",
        "eval --workers 257",
        "eval-answers --precision 0",
        "serve --port 65536",
        "serve --record-max-gb 0",
        "serve --rate-limit 0",
        "serve --deadline-ms 0",
        "serve --temperature 1e-320",
        "train finetune --learning-rate 0",
        "train finetune --at-once 0",
        "train init-tiny --seed 4294967296",
        "bench act --clients 1,0",
        "bench act --clients 1,,2",
        "bench load --hz 0",
    ],
)
def test_bounds(command, capsys):
    with pytest.raises(SystemExit) as end:
        main(command.split(" "))
    assert end.value.code == 2 and "must be a" in capsys.readouterr().err


def test_what_a_command_means_is_taken():
    def parse(text):
        return build_parser().parse_args(text.split(" "))

    args = parse("sim --workers 256 --episodes 1 --noise 1 --films 0 --seed 4294967295")
    assert (args.workers, args.episodes, args.noise, args.films, args.seed) == (256, 1, 1.0, 0, 2**32 - 1)
    assert parse("bench act --clients 1,8").clients == [1, 8]
