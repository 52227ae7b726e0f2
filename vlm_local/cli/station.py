"""`station`: a whole AutoEval job against a policy server, in the simulator."""

import argparse
import re
from pathlib import Path

from vlm_local.cli.options import count, number, seed
from vlm_local.cli.output import ProblemPrinter, print_result
from vlm_local.errors import ConfigError

_TASKS = ("open_drawer", "close_drawer", "eggplant_in_sink", "eggplant_in_basket")
_SAME = ("task", "episodes", "max_steps", "clock", "test_every", "reset_policy", "detector", "human_eval", "seed")


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
    text = "the tunnel to the server is silent for so long once in mid-job, and gone once [never]"
    add("--drop-tunnel", type=number(0.1, 600), metavar="S", help=text)
    add("--relay", action="store_true", help="requests go through `relay`, on the station's side of the tunnel")
    text = "run the shell command CMD at that step of that episode, to end the server and start it again [never]"
    add("--restart-at", nargs=2, metavar=("EPISODE:STEP", "CMD"), help=text)
    text = "another station at the same time, in a process of its own [a task of the other scene]"
    add("--second-station", nargs="?", const="other", choices=("other", *_TASKS), metavar="TASK", help=text)
    text = "what undoes the task after an episode: scripted puts the scene as the seed says, oracle, or a policy server"
    add("--reset-policy", default="scripted", metavar="scripted|oracle|URL", help=f"{text} [scripted]")
    text = "what judges success: the simulator's truth, or the server whose /answer is asked"
    add("--detector", default="truth", metavar="truth|URL", help=f"{text} [truth]")
    add("--human-eval", action="store_true", help="as AutoEval's flag: no step is cut to the station's box")
    add("--name", metavar="NAME", help="of the robot, sent in the path: URL/s/NAME")
    add("--seed", type=seed, default=0, metavar="S", help="of the first episode; the next has the next [0]")
    text = "gets eval_data/, auto_eval_log/, films/, station.jsonl, report.json and report.html"
    add("--out", type=Path, required=True, metavar="DIR", help=text)
    parser.set_defaults(run=_run)

    parser = subparsers.add_parser("outcomes", help="success of recorded rollouts, as AutoEval's own files tell it")
    parser.add_argument("recording", metavar="RUN", type=Path, help="run folder of the server")
    parser.add_argument("eval_data", metavar="EVAL_DATA", type=Path, help="folder of the same job's traj_*.pkl")
    parser.add_argument("--out", type=Path, metavar="F.json", help="also gets the table")
    parser.set_defaults(run=_run_outcomes)


def _run(args: argparse.Namespace) -> int:
    from vlm_local.lab.station.report import format_report
    from vlm_local.lab.station.run import JobPlan, run_job
    from vlm_local.lab.station.second import SecondStation
    from vlm_local.progress import open_bar

    plan = JobPlan(
        **{name: getattr(args, name) for name in _SAME},
        url=args.url.rstrip("/") + (f"/s/{args.name}" if args.name else ""),
        drop_s=args.drop_tunnel,
        has_relay=args.relay,
        restart_at=_parse_restart(args.restart_at),
    )
    second = None if args.second_station is None else SecondStation(args.url, plan, args.second_station, args.out)
    try:
        if second is not None:
            second.wait_begun()
        with open_bar("station", plan.episodes, "episode") as bar:
            report = run_job(plan, args.out, lambda done: bar.update(1))
        if second is not None:
            report["second"] = second.finish()
    finally:
        if second is not None:
            second.close()
    hidden = ("versions", "git", "machine")
    shown = {name: report[name] for name in report if name not in hidden}
    print_result(args, format_report(report), shown)
    return 1 if any(each["would_have_ended"] for each in (report, report.get("second") or report)) else 0


def _parse_restart(words: list[str] | None) -> tuple[int, int, str] | None:
    """Raises ConfigError."""
    if words is None:
        return None
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", words[0])
    if match is None:
        raise ConfigError(f"--restart-at {words[0]!r}: expected EPISODE:STEP, both counted from 0, such as 1:30")
    return int(match[1]), int(match[2]), words[1]


def _run_outcomes(args: argparse.Namespace) -> None:
    from vlm_local.files import write_json
    from vlm_local.lab.station.outcomes import format_outcomes, join_outcomes

    table = join_outcomes(args.recording, args.eval_data, ProblemPrinter())
    if args.out is not None:
        write_json(args.out, table)
    shown = {name: value for name, value in table.items() if name != "episodes"}
    print_result(args, format_outcomes(table), shown)
