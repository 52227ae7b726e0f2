"""`python -m vlm_local COMMAND`: parses and wires, nothing else.

Each module of this folder adds its commands with `add_commands(subparsers)` and imports what they
need only when they run, so that --help stays fast. A command is `run(args) -> exit status`, None for 0.
"""

import argparse
import errno
import functools
import importlib
import io
import os
import pkgutil
import select
import sys
import threading
import traceback
from contextlib import redirect_stdout
from typing import NoReturn, TextIO

from vlm_local.cli.options import fill_from_settings
from vlm_local.cli.output import ShowVersion, add_output_options, set_verbosity
from vlm_local.cli.parser import CommandParser
from vlm_local.errors import VLMLocalError
from vlm_local.interrupts import InterruptWatch
from vlm_local.plain import PlainStream, escape_controls, hide_secrets

ENGINE_THREAD = "engine"  # as engines.worker names it, which is not imported here: --help stays fast
GROUPS = {
    "serve a robot": ("serve", "demo", "relay", "doctor", "models", "fetch"),
    "look at what was recorded": ("runs", "view", "replay", "export", "label", "calibrate"),
    "find out how good a policy is": (
        "sim",
        "station",
        "outcomes",
        "eval",
        "tune",
        "compare",
        "eval-answers",
        "eval-choices",
        "spatial",
        "ceiling",
    ),
    "show it to others": ("share", "pack", "verify", "leaderboard", "card"),
    "train, measure": ("train", "bench"),
    "set up a shell": ("completion",),
}
_EPILOG = (
    "A command with a result prints a table, and the result as one JSON object in its last line.\n"
    "Exit status: 0 done, 1 something was found wrong, 2 cannot be done as asked, 130 stopped by Ctrl-C."
)
_CLOSED_PIPE = 128 + 13  # as a program ends that SIGPIPE ends
_FULL = (errno.ENOSPC, errno.EDQUOT)


@functools.cache  # parsing changes nothing in it
def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="vlm-local",
        usage="vlm-local COMMAND [options]; `vlm-local COMMAND --help` lists them",
        description="A local VLM answers a robot in movement phrases.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=ShowVersion)
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, prog="vlm-local", help=argparse.SUPPRESS
    )
    for module in pkgutil.iter_modules(__path__):
        commands = importlib.import_module(f"{__name__}.{module.name}")
        if hasattr(commands, "add_commands"):  # options.py and the like have none
            commands.add_commands(subparsers)
    parser.epilog = f"{parser.describe_groups(GROUPS)}\n\n{_EPILOG}"
    for _, command in parser.walk():
        if command.commands is None:
            add_output_options(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status. SystemExit is argparse's, for --help and wrong flags."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # a closed pipe shows here, not when the interpreter ends
    except BrokenPipeError:
        if not _is_output_closed():
            raise
        return _CLOSED_PIPE
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _discard(sys.stdout)
        print(f"vlm-local: what was to be printed is lost: {error.strerror}", file=sys.stderr)
        return 2


def _run(argv: list[str] | None) -> int:
    """argv: None for the command line of this process; then Ctrl-C ends it soon, whatever its threads do.

    A command that goes on where it was stopped says so with `goes_on` among its defaults.
    """
    args = build_parser().parse_args(argv)
    set_verbosity(args)
    stopped = f"vlm-local {args.command}: stopped"
    watch = InterruptWatch(f"{stopped}; {args.goes_on}" if hasattr(args, "goes_on") else stopped)
    if argv is None and args.command != "serve":  # which ends in order, with what is in flight
        watch.start()
    try:
        fill_from_settings(args)
        with redirect_stdout(PlainStream(sys.stdout)):
            return _run_command(args, watch)
    except VLMLocalError as error:
        print(escape_controls(hide_secrets(f"vlm-local {args.command}: {error}"), "\n"), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("", "vlm_local"):
            raise
        print(
            f"vlm-local {args.command}: {sys.executable} has no package {error.name}; run .venv/bin/python, which "
            "`bash run_server.sh` makes and fills",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        # Of a file that this user may not read or write, or a full disk: nothing that a traceback would explain.
        if error.filename is None and error.errno not in _FULL:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        print(escape_controls(f"vlm-local {args.command}: {place}{error.strerror}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        watch.tell()
        return 130


def _run_command(args: argparse.Namespace, watch: InterruptWatch) -> int:
    try:
        return args.run(args) or 0
    except Exception:
        if watch.has_come:
            raise KeyboardInterrupt from None
        raise


def _is_output_closed() -> bool:
    """Whether nobody reads what is printed any more (`| head`); the rest of it then goes nowhere."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _is_pipe_closed(stream.fileno())]
    for stream in closed:
        _discard(stream)
    return bool(closed)


def _discard(stream: TextIO) -> None:
    """Have what is still printed there go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_pipe_closed(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def start() -> NoReturn:
    """The process of `python -m vlm_local` and `vlm-local`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may know no ± and no umlauts
    try:
        status = main()
    except SystemExit as error:  # argparse's
        status = error.code
    except KeyboardInterrupt:  # before the command began
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    if any(thread.name == ENGINE_THREAD for thread in threading.enumerate()):
        # A forward or a load still runs. The interpreter cannot end its thread in order: it would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else bool(status))
    sys.exit(status)
