"""Commands that ask policies about recorded steps: eval, replay."""

import argparse
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

from vlm_local.cli.options import (
    add_asked_options,
    add_episode_option,
    add_policy_options,
    read_data_options,
    read_policy_options,
    seed,
    workers,
)
from vlm_local.cli.output import ProblemPrinter, describe_data, print_result, tell
from vlm_local.errors import ConfigError, DataError
from vlm_local.plain import escape_controls

_WIDTH = 44  # of a phrase in `replay`, and more where one is longer
_HEADLINES = ("steps", "episodes", "unanswered", "exact", "axis_accuracy", "opposite")


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("eval", help="score a policy on recorded robot data")
    parser.description = (
        "Asks a policy about recorded steps and scores it against their movement phrases, beside baselines. --policy "
        "also takes the URL of any AutoEval policy server, and majority, repeat-last, random or oracle-label."
    )
    add_asked_options(parser, "gets rows.jsonl, report.json, report.html")
    text = "only this one: its number from 0, or its name in a recorded run; may be given again [all]"
    parser.add_argument("--episode", action="append", default=[], metavar="NAME", help=text)
    parser.add_argument("--seed", type=seed, default=0, help="of draws, intervals and tests [0]")
    parser.add_argument("--workers", type=workers, default=1, metavar="N", help="episodes at a time [1]")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)  # what is always done
    add_policy_options(parser, "--policy")
    parser.set_defaults(run=_eval, goes_on="the same command goes on from here")

    parser = subparsers.add_parser("replay", help="answer a recorded run again, phrases side by side")
    parser.add_argument("recording", metavar="RUN", type=Path, help="folder that a server or the simulator recorded")
    parser.add_argument("--seed", type=seed, default=0, help="for episodes recorded without one [0]")
    add_episode_option(parser)
    text = "also record the answers there, to `view` them beside the recording"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    add_policy_options(parser, "--policy")
    parser.set_defaults(run=_replay)


def _eval(args: argparse.Namespace) -> None:
    from vlm_local.assembly import refuse_all_but
    from vlm_local.data import count_episodes, open_data_set
    from vlm_local.lab.offline import baselines
    from vlm_local.lab.offline.report import format_report
    from vlm_local.lab.offline.run import EvaluationPlan, evaluate
    from vlm_local.lab.sources import describe_unloaded, name_policy, open_source
    from vlm_local.progress import open_bar

    options = read_policy_options(args)
    if args.examples and args.camera:  # an episode is known by its pictures
        raise ConfigError("--examples shows the main camera's pictures; leave --camera out")
    if args.model in baselines.NAMES:
        refuse_all_but(options, "offline", "embodiment")
    selection = read_data_options(args)
    about = open_data_set(args.data, selection, lambda problem: None).about
    names = ("data", "camera", "every", "limit", "seed", "split", "state_layout")
    plan = EvaluationPlan(
        name_policy(options),
        **{name: getattr(args, name) for name in names},
        embodiment=selection.embodiment,
        episodes=tuple(args.episode),
    )
    num_episodes = len(args.episode) or min(count_episodes(args.data, args.split), args.limit or sys.maxsize)

    def open_data(report):
        episodes = open_data_set(args.data, selection, report).episodes
        return _choose_episodes(episodes, args.episode, args.limit, args.data)

    with open_bar("eval", num_episodes, "episode") as shown:
        report = evaluate(
            plan,
            args.out,
            open_data,
            lambda: open_source(options),
            args.workers,
            known={} if args.model in baselines.NAMES else describe_unloaded(options),
            about_data=about,
            progress=shown.update,
            warn=lambda text: shown.write(escape_controls(f"left out: {text}"), file=sys.stderr),
        )
    table = f"read: {describe_data(about)}\n{format_report(report)}\nreport: {args.out / 'report.html'}"
    result = {name: report[name] for name in _HEADLINES} | {"left_out": len(report["left_out"])}
    result |= {"interval": report["intervals"].get("exact"), "policy": report["policy"]["name"], "out": str(args.out)}
    print_result(args, table, result)


def _choose_episodes(episodes, chosen, limit, source):
    """Those of the first `limit` (None: of all) with a name or number in `chosen`, all where it is empty.

    Raises DataError at the end for one that is not there.
    """
    missing = set(chosen)
    for episode in episodes:
        if limit is not None and episode.index >= limit:
            break
        names = {str(episode.index), Path(episode.source).name}
        if not chosen or names.intersection(chosen):
            missing -= names
            yield episode
            if chosen and not missing:
                return
    if missing:
        raise DataError(f"{source} has no episode {', '.join(sorted(missing))}")


def _replay(args: argparse.Namespace) -> None:
    from vlm_local.data.runs import RunWriter, read_run
    from vlm_local.lab.formats import format_share
    from vlm_local.lab.offline.replay import count_reasoned, record_replay, tell_reasoned
    from vlm_local.lab.sources import name_policy, open_source

    options = read_policy_options(args)
    name = name_policy(options)
    if not (args.recording / "episodes").is_dir():
        raise DataError(f"{args.recording} is no recorded run: it has no folder episodes/; `runs` lists them")
    if args.out is not None and (args.out / "episodes").exists():
        raise ConfigError(f"{args.out} holds a run already; choose another --out")
    counts: Counter[str] = Counter()
    with closing(open_source(options)) as source:
        policy = source.build("replay")
        writer = None
        for episode in read_run(args.recording, ProblemPrinter(), args.episode):
            steps = _replay_episode(args, episode, policy, name)
            if args.out is not None:
                writer = writer or RunWriter(args.out, {"replay": True, **policy.metadata})
                record_replay(writer, episode, steps, policy.metadata.get("model") or name)
            recorded, replayed = count_reasoned(episode.lines, steps)
            num_same = sum(not step.differs for step in steps)
            counts.update(steps=len(steps), same=num_same, recorded=recorded, replayed=replayed)
    if not counts["steps"]:
        raise DataError(f"{args.recording} holds no step")
    share = format_share(counts["same"] / counts["steps"])
    table = f"\n{counts['same']} of {counts['steps']} answers are the same ({share})"
    if told := tell_reasoned(counts["recorded"], counts["replayed"]):
        table += f"\n{told}"
    out = {} if args.out is None else {"out": str(args.out)}
    reasoned = {side: counts[side] for side in ("recorded", "replayed")}
    print_result(args, table, {"steps": counts["steps"], "same": counts["same"], "reasoned": reasoned, **out})


def _replay_episode(args: argparse.Namespace, episode, policy, name: str) -> list:
    """Print an episode's steps as they are answered, under the policy's name; returns them."""
    from vlm_local.lab.offline.replay import replay_episode

    width = max([_WIDTH, *(len(str(line.get("phrase"))) for line in episode.lines)])
    head = f"{'step':>5}   {'recorded':{width}} {name}"
    tell(args, f"\n{Path(episode.source).name}\n{head}")
    steps = []
    for step in replay_episode(episode, policy, args.seed):
        tell(args, _format_step(step, width))
        steps.append(step)
    first = next((step.step for step in steps if step.differs), None)
    tell(args, "they agree throughout" if first is None else f"first divergence: step {first}")
    return steps


def _format_step(step, width: int) -> str:
    """A line of `replay`; width: of what was recorded."""
    mark = "≠" if step.differs else " "
    note = f"  ({step.problem})" if step.problem else ""
    return f"{step.step:5} {mark} {step.recorded or 'no answer':{width}} {step.answered or 'no answer'}{note}"
