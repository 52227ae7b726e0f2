"""`eval-choices`: a model answers a benchmark of multiple-choice questions."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from vlm_local.cli.answers import open_answerer
from vlm_local.cli.options import add_model_options
from vlm_local.cli.output import print_result
from vlm_local.errors import ConfigError
from vlm_local.plain import escape_controls


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("eval-choices", help="score a model on a benchmark of multiple-choice questions")
    parser.description = (
        "Asks a model each question of a TSV file as VLMEvalKit has them (BLINK, RealWorldQA ...), once with its "
        "pictures and once with grey ones: the difference is what it knows by seeing."
    )
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="the questions, with their pictures")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="gets rows.jsonl, report.json, report.html"
    )
    add_model_options(parser, "--policy")
    parser.set_defaults(run=run, goes_on="the same command goes on from here")


def run(args: argparse.Namespace) -> None:
    from vlm_local.assembly import is_url
    from vlm_local.data.multiple_choice import count_questions, hash_file, open_questions
    from vlm_local.lab.multiple_choice.run import evaluate_questions
    from vlm_local.policy_options import PolicyOptions
    from vlm_local.progress import open_bar

    if is_url(args.model):
        raise ConfigError("a policy server asks about a robot's workspace; give the model itself, or --engine openai")
    total = count_questions(args.data)
    left_out: list[str] = []
    with open_answerer(args) as (answerer, policy), open_bar("eval-choices", total, "question") as bar:
        questions = open_questions(args.data, lambda error: left_out.append(str(error)))
        # A setting of driving, which this command has no flag for, decides no answer and makes no difference.
        driving = {field.name for field in fields(PolicyOptions)} - set(vars(args))
        policy = {name: value for name, value in policy.items() if name not in driving}
        about = {"policy": policy, "data": args.data.name, "data_sha256": hash_file(args.data)}
        report = evaluate_questions(questions, answerer.choose, args.out, about, left_out, lambda: bar.update())
    for line in left_out[:10]:
        print(escape_controls(f"left out: {line}"), file=sys.stderr)
    names = ("questions", "failed", "chance", "measures", "said", "right")
    result = {name: report[name] for name in names} | {"left_out": len(left_out), "out": str(args.out)}
    print_result(args, _format_report(report, args.out), result)


def _format_report(report: dict, folder: Path) -> str:
    """For a terminal."""
    from vlm_local.lab.formats import format_p, format_points, format_share, format_span

    width = max(24, *(len(measure["name"]) + 1 for measure in report["measures"]))
    lines = [
        f"\n{report['questions']} questions of {report['data']}, {len(report['left_out'])} left out; guessing reaches "
        f"{format_share(report['chance'])}",
        f"{'':{width}}{'n':>6}{'right':>9}{'95 %':>15}{'grey':>9}{'by seeing':>11}{'p':>9}",
    ]
    for measure in report["measures"]:
        seeing, blind, difference = (measure[name] for name in ("seeing", "blind", "difference"))
        span = format_span(seeing["interval"], 1) if seeing["interval"] else "-"
        lines.append(
            f"{measure['name']:{width}}{measure['n']:6}{format_share(seeing['value']):>9}{span:>15}"
            f"{format_share(blind['value']):>9}{format_points(difference['value'], 1, '+'):>11}"
            f"{format_p(difference['p_value']):>9}"
        )
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])
