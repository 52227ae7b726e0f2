"""`sim`: any policy in the simulator."""

import argparse

from vlm_local.cli.options import add_policy_options, count, number, read_policy_options, seed, workers

_TASKS = "reach, reach_relation, open_drawer, close_drawer, eggplant_in_basket, eggplant_in_sink, push, lift"


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "sim",
        help="play a policy in the simulator: films, report, success rates",
        description='Plays any policy, also "oracle", which sees the ground truth. Ends with one line of JSON.',
        epilog="The same command again continues a run, adds episodes and plays again what faulted.",
    )
    add = parser.add_argument
    add("--task", default="reach", metavar="T[,T]|all", help=f"{_TASKS} [reach]")
    add(
        "--level",
        default="normal",
        help="easy, normal, varied, hard; words, light: as normal, but for unseen ones [normal]",
    )
    add("--episodes", type=count(1, 100_000), default=10, metavar="N", help="of each task [10]")
    add("--seed", type=seed(), default=0, metavar="S", help="of the first episode; the next has the next [0]")
    add("--max-steps", type=count(), default=120, metavar="N", help="5 a second [120]")
    add("--workers", type=workers(), metavar="N", help="environments in parallel [one a core, at most 8]")
    text = "episodes of each task that keep frames and a film [10]"
    add("--films", type=count(0), default=10, metavar="N", help=text)
    add("--noise", type=number(0, 1), default=0.0, metavar="SHARE", help="of phrases replaced by random ones [0]")
    add("--control", default="none", choices=("none", "blank-image", "wrong-instruction"), help="[none]")
    add("--gif", action="store_true", help="a GIF beside every film")
    add("--out", metavar="DIR", help="[runs/sim-POLICY-TASK-LEVEL-SEED]")
    add_policy_options(parser, "--policy")
    parser.set_defaults(run=_run_sim, goes_on="the same command goes on from here")


def _run_sim(args: argparse.Namespace) -> int:
    from vlm_local.sim.command import run_sim

    return run_sim(args, read_policy_options(args))
