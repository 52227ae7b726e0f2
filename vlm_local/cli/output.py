"""What a command says: a table for people, and one JSON object as the last line for programs."""

import argparse
import logging
import sys
from collections.abc import Mapping
from typing import Any

from vlm_local.plain import escape_controls

_LOG_LINE = "%(levelname)s %(message)s"


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """-q and -v, of every command."""
    group = parser.add_argument_group("output").add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="only errors and the last line")
    group.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")


def set_verbosity(args: argparse.Namespace) -> None:
    """As -q and -v say. `serve` starts a log of its own."""
    from vlm_local.progress import set_quiet

    set_quiet(args.quiet)
    if args.verbose and args.command != "serve":
        logging.basicConfig(level=logging.INFO, format=_LOG_LINE)
    logging.getLogger("vlm_local").setLevel(logging.DEBUG if args.verbose else logging.NOTSET)


def tell(args: argparse.Namespace, text: str) -> None:
    """Print what people want to know before the result, unless --quiet."""
    if not args.quiet:
        print(text, flush=True)


def print_result(args: argparse.Namespace, table: str, result: Mapping[str, Any]) -> None:
    """`table` unless --quiet, then `result` as one line of JSON."""
    from vlm_local.files import encode_json

    if not args.quiet:
        print(table)
    print(encode_json(result))


def describe_data(about) -> str:
    """What is read of a data set, e.g. "LeRobot v2.1, 5 frames a second, camera image_0, state layout pose"."""
    splits = f"split{'s' * (len(about['splits']) > 1)} {', '.join(about['splits'])}"
    words = [
        about["format"],
        f"{about['fps']:g} frames a second" if "fps" in about else "",
        f"camera {about['camera']}" if about["camera"] else "",
        splits if any(about["splits"]) else "",
        f"state layout {about['state_layout']}",
    ]
    return ", ".join(filter(None, words))


class ProblemPrinter:
    """Given every record that cannot be used: prints it and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, error: Exception) -> None:
        self.count += 1
        print(escape_controls(f"left out: {error}"), file=sys.stderr)


class ShowVersion(argparse.Action):
    """--version: of this package and what answers depend on, and the device that a model would be put on."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="versions and device", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        from vlm_local.machine import describe_device
        from vlm_local.provenance import describe_machine

        versions = describe_machine()["versions"]
        shown = ("vlm_local", "python", "torch", "transformers")
        print("\n".join(f"{name} {versions.get(name, 'is not installed')}" for name in shown))
        print(f"device {describe_device()}")
        parser.exit()
