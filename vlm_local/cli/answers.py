"""`eval-answers`: scores a success detector on labelled pictures."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_local.cli.options import add_model_options, number, read_policy_options
from vlm_local.cli.output import print_result
from vlm_local.errors import ConfigError
from vlm_local.plain import escape_controls, hide_secrets

if TYPE_CHECKING:
    from vlm_local.answers import Answerer


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("eval-answers", help="score a success detector on labelled pictures")
    parser.description = (
        "Asks a model one question about every picture of --data and scores its answers. --policy also takes the URL "
        "of a running server. --data holds AutoEval's record-*.pkl or positives.pkl and negatives.pkl, a live page's "
        "labels.jsonl, or a folder of pictures for each answer."
    )
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="the labelled pictures")
    parser.add_argument("--question", help="what to ask [what the data say]")
    text = "positives.pkl and negatives.pkl are older than 2026-01-29: blue comes first"
    parser.add_argument("--bgr", action="store_true", help=text)
    parser.add_argument(
        "--precision", type=number(0.001, 1), default=0.95, metavar="P", help="wanted of answers that count [0.95]"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="gets rows.jsonl, report.json, report.html"
    )
    add_model_options(parser, "--policy", "; a server's URL")
    parser.set_defaults(run=run, goes_on="the same command goes on from here")


def run(args: argparse.Namespace) -> None:
    from vlm_local.answers import check_choices
    from vlm_local.data.questions import open_labelled
    from vlm_local.lab.detector.run import evaluate_detector
    from vlm_local.progress import open_bar

    labelled = open_labelled(args.data, args.bgr, args.question)
    check_choices(list(labelled.choices))
    question = args.question or labelled.question
    if question is None:
        raise ConfigError(f"{args.data} says no question; say with --question what to ask about them")
    left_out: list[str] = []
    with (
        _open_detector(args, question, labelled.choices) as (ask, policy),
        open_bar("eval-answers", unit="picture") as bar,
    ):
        images = labelled.open_images(lambda error: left_out.append(str(error)))
        about = {"policy": policy, "data": args.data.name, "question": question}
        report = evaluate_detector(
            images, labelled.choices, ask, args.out, args.precision, about, left_out, lambda: bar.update()
        )
    for line in left_out[:10]:
        print(escape_controls(f"left out: {line}"), file=sys.stderr)
    result = pick_scores(report) | {"left_out": len(left_out), "out": str(args.out)}
    print_result(args, format_report(report, args.out), result)


def pick_scores(report: dict) -> dict:
    """What the last line of the output tells of a report."""
    names = ("images", "accuracy", "interval", "majority", "by_answer", "calibration")
    return {name: report[name] for name in names}


@contextmanager
def open_answerer(args: argparse.Namespace) -> Iterator[tuple["Answerer", dict]]:
    """What answers questions, with its model loaded, and what it says of itself."""
    from vlm_local.assembly import open_policies
    from vlm_local.registry import DEFAULT

    name, policies = args.model or DEFAULT, open_policies(read_policy_options(args))
    try:
        if policies.answerer is None:
            raise ConfigError(f"{name} is no model, so it answers no questions")
        if policies.worker is not None:
            policies.worker.wait_loaded()
        yield policies.answerer, {"name": name, **policies.metadata}
    finally:
        policies.close()


@contextmanager
def _open_detector(args: argparse.Namespace, question: str, choices: tuple[str, ...]):
    """(picture -> answer, what the detector says of itself)."""
    from vlm_local.answers import Question, ask_server
    from vlm_local.assembly import is_url, refuse_all_but
    from vlm_local.client import Detector

    if is_url(args.model):
        refuse_all_but(read_policy_options(args), "offline")
        detector = Detector(args.model, choices)
        yield lambda image: ask_server(detector, Question(image, question, choices)), {"name": hide_secrets(args.model)}
        return
    with open_answerer(args) as (answerer, policy):
        yield lambda image: answerer.answer(Question(image, question, choices)), policy


def format_report(report: dict, folder: Path) -> str:
    """For a terminal."""
    from vlm_local.lab.formats import format_fixed, format_share, format_span

    span = format_span(report["interval"], decimals=1)
    interval = f"  ({span} %)" if span else ""
    majority = report["majority"]
    wanted = f"threshold for {format_share(report['wanted_precision'], decimals=0)}"
    lines = [
        f"\n{report['images']} pictures, {len(report['left_out'])} left out: {report['question']}",
        f"right answers {format_share(report['accuracy'])}{interval}; always {majority['answer']!r} "
        f"{format_share(majority['accuracy'])}",
        f"{'answer':16}{'pictures':>9}{'recall':>9}{'precision':>11}{'AUC':>8}   {wanted}",
    ]
    for choice, score in report["by_answer"].items():
        at = score["at_precision"]
        if at is not None:
            found = f"{at['threshold']:.3f} keeps {at['kept']} of {at['given']}"
        else:  # where nothing was answered so, or no probability is known, there is none to look for
            found = "none reaches it" if score["precision"] is not None and report["calibration"] else "-"
        lines.append(
            f"{choice[:15]:16}{score['images']:9}{format_share(score['recall']):>9}{format_share(score['precision']):>11}"
            f"{format_fixed(score['auc'], 3):>8}   {found}"
        )
    if report["calibration"]:
        lines.append(
            f"calibration error {report['calibration']['ece']:.3f}, Brier {report['calibration']['brier']:.3f}"
        )
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])
