"""`doctor`: what is wrong with this machine, or with a policy server."""

import argparse

from vlm_local.cli.output import print_result

_HELP = "examine a policy server, or without an URL this machine"


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "doctor", help=_HELP, description=f"{_HELP}. The server's unnamed robot is reset and driven: keep arms off it."
    )
    parser.add_argument("url", nargs="?", metavar="URL", help="of any server of AutoEval's protocol")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a line a finding; 1 when any failed."""
    from vlm_local.errors import ConfigError

    if args.url is None:
        from vlm_local.machine import examine

        findings = examine()
    else:
        from vlm_local import doctor

        try:
            findings = doctor.examine(args.url)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    shown = []
    for finding in findings:
        if not args.quiet or finding.verdict != "ok":
            print(finding, flush=True)
        shown.append(finding)
    failed = sum(finding.verdict == "FAIL" for finding in shown)
    told = [{"verdict": finding.verdict, "name": finding.name, "text": finding.text} for finding in shown]
    print_result(args, f"{failed} of the above failed", {"failed": failed, "findings": told})
    return 1 if failed else 0
