"""`station`: a whole AutoEval job against a policy server, in the simulator."""

import argparse
from pathlib import Path

from vlm_local.cli.options import count, number, seed
from vlm_local.cli.output import print_result

_TASKS = ("open_drawer", "close_drawer", "eggplant_in_sink", "eggplant_in_basket")


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "station",
        help="a whole AutoEval job against any policy server, in the simulator",
        description="Sends and executes what an AutoEval station does, and tells what would have ended the job.",
        epilog="Exit status 0 only where nothing would have.",
    )
    add = parser.add_argument
    add("url", metavar="URL", help="of the policy server, such as http://127.0.0.1:8000")
    add("--task", required=True, choices=_TASKS, help="the job's task")
    add("--episodes", type=count(1, 1000), default=10, metavar="N", help="[10]")
    add("--max-steps", type=count(1, 10_000), default=70, metavar="N", help="of every episode [70]")
    add("--clock", choices=("step", "wall"), default="step", help="whether the world waits for answers [step: it does]")
    text = "a submission test in the middle of every Nth episode, 0 for none [1]"
    add("--test-every", type=count(0, 1000), default=1, metavar="N", help=text)
    text = "the way to the server is silent for so long, once in mid-job [never]"
    add("--drop-tunnel", type=number(0.1, 600), metavar="S", help=text)
    add("--seed", type=seed(), default=0, metavar="S", help="of the first episode; the next has the next [0]")
    add("--out", type=Path, required=True, metavar="DIR", help="gets eval_data/, station.jsonl and report.json")
    parser.set_defaults(run=_run)

    parser = subparsers.add_parser(
        "outcomes", help="how the rollouts ended that a server recorded, by AutoEval's files"
    )
    parser.add_argument("recording", metavar="RUN", type=Path, help="run folder of the server")
    parser.add_argument("eval_data", metavar="EVAL_DATA", type=Path, help="folder of the same job's traj_*.pkl")
    parser.add_argument("--out", type=Path, metavar="F.json", help="also gets the table")
    parser.set_defaults(run=_run_outcomes)


def _run(args: argparse.Namespace) -> int:
    from vlm_local.lab.station.run import JobPlan, format_report, run_job
    from vlm_local.progress import open_bar

    plan = JobPlan(
        args.url, args.task, args.episodes, args.max_steps, args.clock, args.test_every, args.drop_tunnel, args.seed
    )
    with open_bar("station", plan.episodes, "episode") as bar:
        report = run_job(plan, args.out, lambda done: bar.update(1))
    shown = {name: report[name] for name in report if name not in ("versions", "git", "machine")}
    print_result(args, format_report(report), shown)
    return 1 if report["would_have_ended"] else 0


def _run_outcomes(args: argparse.Namespace) -> int:
    from vlm_local.cli.data import ProblemPrinter
    from vlm_local.files import write_json
    from vlm_local.lab.station.outcomes import format_outcomes, join_outcomes

    table = join_outcomes(args.recording, args.eval_data, ProblemPrinter())
    if args.out is not None:
        write_json(args.out, table)
    shown = {name: value for name, value in table.items() if name != "episodes"}
    print_result(args, format_outcomes(table), shown)
    return 0
