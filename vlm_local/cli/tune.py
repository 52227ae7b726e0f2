"""`tune`: which prompt, examples, frames, marks, contrast help this model on these data?"""

import argparse

from vlm_local.cli.options import (
    add_asked_options,
    add_policy_options,
    read_data_options,
    read_policy_options,
    seed,
)
from vlm_local.cli.output import describe_data, print_result


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("tune", help="find the settings with which a model says your recorded labels best")
    parser.description = (
        "Tries prompts, grammar, marks, examples, past frames, history, thinking and contrast one after the other on "
        "two thirds of the episodes, by the log-loss of the label, keeps what brings more than chance, and scores the "
        "choice once on the other third. Writes vlm_local.json for --settings. It begins with the policy options given."
    )
    add_asked_options(parser, "gets vlm_local.json, report.html, report.md")
    add = parser.add_argument
    add("--seed", type=seed, default=0, help="of the split, of draws, intervals and tests [0]")
    text = "what is tried: prompt, grammar, marks, examples, frames, history, think, contrast [all]"
    add("--rungs", metavar="NAME,...", help=text)
    add("--prompts", metavar="FILE,...", help="templates of your own that are tried, see docs/zeroshot.md")
    add_policy_options(parser)
    parser.set_defaults(run=_run, goes_on="the same command goes on from here")


def _run(args: argparse.Namespace) -> None:
    from itertools import takewhile

    from vlm_local.data import open_data_set
    from vlm_local.lab.sources import name_policy
    from vlm_local.lab.tune.ask import TuningPlan
    from vlm_local.lab.tune.report import format_report
    from vlm_local.lab.tune.run import CHOSEN, tune
    from vlm_local.progress import open_bar

    options = read_policy_options(args)
    selection = read_data_options(args)
    about = open_data_set(args.data, selection, lambda problem: None).about
    names = ("every", "limit", "seed", "rungs", "prompts")
    given = {name: getattr(args, name) for name in names}
    plan = TuningPlan(name_policy(options), args.data, selection, **given)

    def open_data(report):
        episodes = open_data_set(args.data, selection, report).episodes
        return takewhile(lambda episode: args.limit is None or episode.index < args.limit, episodes)

    with open_bar("tune") as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(what)

        report = tune(plan, args.out, options, open_data, about_data=about, progress=show)
    chosen = args.out / CHOSEN
    table = f"\nread: {describe_data(about)}\n{format_report(report)}\nreport: {args.out / 'report.html'}"
    result = {"setting": report["chosen"], **report["held_out"], "settings": str(chosen), "out": str(args.out)}
    print_result(args, f"{table}\nto use the choice: --settings {chosen}", result)
