"""`ceiling`: what could any model reach in these phrases, and what does each kind of mistake cost?"""

import argparse
from pathlib import Path

from vlm_local.cli.options import count, seed, workers
from vlm_local.cli.output import print_result
from vlm_local.errors import ConfigError

_EPISODES, _SEED = 100, 100_000


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "ceiling", help="what any model could reach: an oracle with other step sizes, delays, mistakes"
    )
    parser.description = (
        "Plays an oracle that knows the true state and says phrases, without pictures, for many step sizes, steps per "
        "phrase, latencies, vocabularies and rates of mistakes; and predicts the success of a policy in the simulator "
        "from its recorded answers."
    )
    parser.epilog = (
        "The same command again goes on where it was stopped, and adds tasks and episodes. With --predict only the "
        "predictions are played, and the pages of DIR made anew."
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="gets rows.jsonl, report.json, report.html, figures")
    add(
        "--env",
        default="ours",
        metavar="NAME",
        help="ours, metaworld, libero or simpler, see docs/environments.md [ours]",
    )
    add("--tasks", default="all", metavar="T[,T]|all", help="[all]")
    add("--level", default="normal", help="easy, normal, hard [normal]")
    add(
        "--episodes",
        type=count(1, 100_000),
        default=_EPISODES,
        metavar="N",
        help=f"of each task and setting, or prediction [{_EPISODES}]",
    )
    add("--seed", type=seed, default=_SEED, metavar="S", help=f"of the first episode [{_SEED}]")
    add("--workers", type=workers, default=2, metavar="N", help="processes [2]")
    add("--predict", nargs="+", type=Path, default=(), metavar="RESULT", help="answers to predict from: of eval or sim")
    add("--observed", nargs="+", type=Path, default=(), metavar="RESULT", help="what each of them predicts: of sim")
    parser.set_defaults(run=_run, goes_on="the same command goes on from here")


def _run(args: argparse.Namespace) -> None:
    from vlm_local.environments import OURS, find_suite
    from vlm_local.lab.ceiling.episodes import CeilingPlan
    from vlm_local.lab.ceiling.error_models import DRAWS
    from vlm_local.lab.ceiling.run import run_predictions, run_study

    suite = find_suite(args.env)
    plan = CeilingPlan(suite.choose(args.tasks), args.level, args.episodes, args.seed, args.env)
    if args.env != OURS:
        if args.predict or args.observed:
            raise ConfigError("--predict and --observed are of our own simulator alone")
        _run_benchmark(args, plan)
        return
    if args.predict or args.observed:
        report = run_predictions(args.out, args.predict, args.observed, args.episodes, args.workers)
    else:
        report = run_study(args.out, plan, args.workers)
    lines = []
    for prediction in report["predictions"]:
        errors = ", ".join(f"{100 * prediction['mean_error'][draw]:.1f} points {draw}" for draw in DRAWS)
        lines.append(f"{prediction['observed']} from {prediction['source']}: mean error {errors}")
    lines.append(f"report: {args.out / 'report.html'}")
    numbers = ("observed", "source", "mean_error")
    predictions = [{name: prediction[name] for name in numbers} for prediction in report["predictions"]]
    print_result(args, "\n".join(lines), {**report["plan"], "predictions": predictions, "out": str(args.out)})


def _run_benchmark(args: argparse.Namespace, plan) -> None:
    from vlm_local.environments import LIBERO, METAWORLD, SIMPLER
    from vlm_local.lab.ceiling.benchmarks import run_benchmark
    from vlm_local.lab.ceiling.libero import LIBERO_STUDY
    from vlm_local.lab.ceiling.metaworld import METAWORLD_STUDY
    from vlm_local.lab.ceiling.simpler import SIMPLER_STUDY
    from vlm_local.lab.formats import format_share

    studies = {METAWORLD: METAWORLD_STUDY, LIBERO: LIBERO_STUDY, SIMPLER: SIMPLER_STUDY}
    report = run_benchmark(studies[args.env], args.out, plan, args.workers)
    rates = {setting["name"]: setting["success"]["rate"] for setting in report["settings"]}
    summary = {**report["plan"], "success_rate": rates, "out": str(args.out)}
    lines = [f"{name:50}{format_share(rate):>8}" for name, rate in rates.items()]
    if "best" in report:
        lines.append(f"{'each task in its best setting':50}{format_share(report['best']['rate']):>8}")
        summary["best"] = report["best"]["rate"]
    lines.append(f"tables: {args.out / 'tables.md'}")
    print_result(args, "\n".join(lines), summary)
