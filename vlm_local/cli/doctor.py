"""`doctor`: what is wrong with this machine, with a policy server, or with a model on this machine."""

import argparse
from pathlib import Path

from vlm_local.cli.options import number
from vlm_local.cli.output import print_result, tell
from vlm_local.errors import ConfigError

_HELP = "examine a policy server, a model with --model, or without either this machine"
_MODEL_ONLY = ("data", "out", "minutes", "quantize", "device", "dtype")  # flags that go with --model
_MINUTES, _OUT = 10.0, Path("results/doctor")


class _Model(argparse.Action):
    """--model: what is then done goes on where it was stopped."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.model, namespace.goes_on = values, "the same command goes on from here"


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help=_HELP,
        description="Examine a policy server, a model with --model, or without either this machine. "
        "The server's unnamed robot is reset and driven: keep arms off it. "
        "A model is loaded, its decoder compared with outlines, timed, shown scenes, recorded steps and the simulator; "
        "all that was found is packed into one archive beside --out.",
    )
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", help="of any server of AutoEval's protocol")
    add("--model", action=_Model, metavar="NAME", help="a name (see `models`), folder or repository to examine")
    add("--data", metavar="DIR", help="with --model: recorded episodes, as `eval` takes them")
    add("--out", type=Path, metavar="DIR", help=f"with --model: gets a JSON a stage, and report.json [{_OUT}]")
    text = f"with --model: time for all; a slow machine does the least of each stage and takes longer [{_MINUTES:g}]"
    add("--minutes", type=number(0.001, 1e5), metavar="M", help=text)
    add("--quantize", choices=("none", "8bit", "4bit"), help="with --model: bitsandbytes [none]")
    add("--device", metavar="auto|cpu|cuda:N", help="with --model [auto: the first GPU]")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="with --model [auto]")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a line a finding; 1 when any failed."""
    if args.model is not None:
        return _check_model(args)
    given = [f"--{name}" for name in _MODEL_ONLY if getattr(args, name) is not None]
    if given:
        raise ConfigError(f"{', '.join(given)} would change nothing without --model")
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


def _check_model(args: argparse.Namespace) -> int:
    """Prints a line a stage, then what was found; 1 when a stage failed or the decoder is wrong."""
    from vlm_local.assembly import is_url

    if args.url is not None or is_url(args.model):
        raise ConfigError("--model takes a model on this machine; a server is examined with `doctor URL` alone")
    from vlm_local.checkup.run import CheckupPlan, run_checkup

    plan = CheckupPlan(args.model, args.data, args.minutes or _MINUTES, args.quantize, args.device, args.dtype)
    checkup = run_checkup(plan, args.out or _OUT, lambda line: tell(args, line))
    lines = ["\nWhat was found:", *checkup.findings, f"To send back: {checkup.archive}"]
    result = {"findings": checkup.findings, "faulty": checkup.is_faulty, "archive": str(checkup.archive)}
    print_result(args, "\n".join(lines), result)
    return 1 if checkup.is_faulty else 0
