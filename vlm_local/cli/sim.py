"""`sim`: any policy in the simulator."""

import argparse
import os
import re
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from vlm_local.cli.options import add_policy_options, count, number, read_policy_options, seed, workers
from vlm_local.cli.output import print_result
from vlm_local.plain import escape_controls

_MAX_WORKERS = 8  # processes, unless --workers asks for more
_TASKS = "reach, reach_relation, open_drawer, close_drawer, eggplant_in_basket, eggplant_in_sink, push, lift"
_MEMORY = "reach_shown, put_back"


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "sim",
        help="play a policy in the simulator: films, report, success rates",
        description='Plays any policy, also "oracle", which sees the ground truth. Ends with one line of JSON.',
        epilog="The same command again continues a run, adds episodes and plays again what faulted.",
    )
    add = parser.add_argument
    add(
        "--env",
        default="ours",
        metavar="NAME",
        help="ours, metaworld (50 tasks), libero (two suites of 10) or simpler (4), see docs/environments.md [ours]",
    )
    text = f"{_TASKS}; not in all: {_MEMORY}; of others e.g. reach-v3, libero_object/0, widowx_stack_cube [the first]"
    add("--task", metavar="T[,T]|all", help=text)
    add(
        "--level",
        default="normal",
        help="easy, normal, hard; varied: hard, in words of training; words, light: normal, with unseen ones [normal]",
    )
    add("--episodes", type=count(1, 100_000), default=10, metavar="N", help="of each task [10]")
    add("--seed", type=seed, default=0, metavar="S", help="of the first episode; the next has the next [0]")
    add(
        "--max-steps",
        type=count(),
        metavar="N",
        help="5 a second [120]; metaworld 80 a second [500], libero 20 a second [280], simpler 5 [60 or 120]",
    )
    add("--workers", type=workers, metavar="N", help="environments in parallel [one a core, at most 8]")
    text = "episodes of each task that keep frames and a film [10]"
    add("--films", type=count(0), default=10, metavar="N", help=text)
    add("--noise", type=number(0, 1), default=0.0, metavar="SHARE", help="of phrases replaced by random ones [0]")
    text = "what the policy is shown in place of the truth, to see what its success rests on [none]"
    add("--control", default="none", choices=("none", "blank-image", "wrong-instruction"), help=text)
    add("--gif", action="store_true", help="a GIF beside every film")
    add("--out", type=Path, metavar="DIR", help="[results/sim-POLICY-TASK-LEVEL-SEED]")
    add_policy_options(parser, "--policy")
    parser.set_defaults(run=_run_sim, goes_on="the same command goes on from here")


def _run_sim(args: argparse.Namespace) -> None:
    """Play, write report.json, report.html and films; print where, and one JSON object as the last line."""
    from vlm_local.environments import find_suite, name_episode, name_robot
    from vlm_local.lab.closed_loop.run import run_rollouts
    from vlm_local.lab.sources import name_policy, open_source
    from vlm_local.progress import open_bar

    suite = find_suite(args.env)
    options = read_policy_options(args)
    plan = _build_plan(args, name_policy(options), suite)
    tasks = args.task or plan.tasks[0]
    name = f"sim-{_shorten(plan.policy)}-{name_robot(tasks)}-{plan.level}-{plan.seed}"
    folder = args.out or Path("results") / name
    source = open_source(options, suite)
    faults: list[str] = []  # of this run, in the order of their episodes' ends
    with closing(source), open_bar(plan.policy, unit="episode") as bar:

        def show(ended, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            name = f"{ended['task']}-{ended['number']}"
            bar.set_postfix_str(f"{name} {ended['outcome']}")
            if ended["outcome"] == "faulted":
                faults.append(f"{name} faulted: {ended['fault']}")

        scores = run_rollouts(folder, plan, source, args.workers or min(os.cpu_count() or 1, _MAX_WORKERS), show)
        if bar.n == 0 and not args.quiet:
            bar.write(f"all episodes are in {folder} already; another --seed or --out plays others")
    if faults:
        print(escape_controls(faults[0]), file=sys.stderr)
    films = [
        film
        for task, number in plan.list_episodes()
        for film in folder.glob(f"episodes/{name_episode(task, number)}/film.mp4")
    ]
    summary = _summarise(scores, plan, folder)
    lines = [_format_table(summary), f"report: {folder / 'report.html'}"]
    if films:
        lines.append(f"films: {len(films)}, the first: {films[0]}")
    print_result(args, "\n".join(lines), summary)


def _build_plan(args: argparse.Namespace, policy: str, suite):
    from vlm_local.lab.closed_loop.run import RolloutPlan

    tasks = suite.choose(args.task or suite.tasks[0])
    names = ("level", "episodes", "seed", "noise", "control", "films", "gif", "env")
    max_steps = args.max_steps or suite.max_steps
    return RolloutPlan(policy, tasks, max_steps=max_steps, **{name: getattr(args, name) for name in names})


def _shorten(policy: str) -> str:
    """A file name for a policy: the last part of a path, a URL's host and port."""
    parts = urlsplit(policy)
    name = parts.netloc if "//" in policy and parts.netloc else policy.rstrip("/").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")


def _summarise(scores, plan, folder: Path) -> dict:
    """The last line. success_rate_70: None for each task where success within AutoEval's limit is not known."""
    from vlm_local.lab.closed_loop.scores import reaches_autoeval

    summary = {name: value for name, value in scores.items() if name != "tasks"} | {
        "policy": plan.policy,
        "env": plan.env,
        "level": plan.level,
        "seed": plan.seed,
        "max_steps": plan.max_steps,
        "interval": {task: score["success"]["interval"] for task, score in scores["tasks"].items()},
        "efficiency": {task: score["efficiency"] for task, score in scores["tasks"].items()},
        "out": str(folder),
    }
    if not reaches_autoeval(summary):
        summary["success_rate_70"] = dict.fromkeys(summary["success_rate_70"])
    return summary


def _format_table(summary: dict) -> str:
    """A line a task."""
    from vlm_local.lab.formats import format_fixed, format_share, format_span

    width = max(20, *map(len, summary["success_rate"]))
    lines = [f"{'':{width}}{'success':>9}  {'95 %':>14}{'within 70':>11}{'step ratio':>12}"]
    for task, rate in summary["success_rate"].items():
        within, ratio = summary["success_rate_70"][task], summary["efficiency"][task]
        span = format_span(summary["interval"][task], decimals=1)
        lines.append(
            f"{task:{width}}{format_share(rate):>9}  {span:>14}{format_share(within):>11}{format_fixed(ratio):>12}"
        )
    if summary["faulted"]:
        lines.append(
            f"{summary['faulted']} of {summary['episodes']} episodes faulted; the same command plays them again"
        )
    return "\n".join(lines)
