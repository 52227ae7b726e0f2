"""`python -m vlm_local COMMAND`: parses and wires, nothing else.

Each module of this folder adds its commands with `add_commands(subparsers)` and imports what they
need only when they run, so that --help stays fast. A command is `run(args) -> exit status`.
"""

import argparse
import importlib
import pkgutil
import sys
from contextlib import redirect_stdout

from vlm_local import __version__
from vlm_local.errors import VLMLocalError
from vlm_local.plain import PlainStream, escape_controls, hide_secrets


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlm-local", description="A local VLM answers a robot in movement phrases.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in pkgutil.iter_modules(__path__):
        commands = importlib.import_module(f"{__name__}.{module.name}")
        if hasattr(commands, "add_commands"):  # options.py has none of its own
            commands.add_commands(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        with redirect_stdout(PlainStream(sys.stdout)):
            return args.run(args)
    except VLMLocalError as error:
        print(escape_controls(hide_secrets(f"vlm-local {args.command}: {error}"), "\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
