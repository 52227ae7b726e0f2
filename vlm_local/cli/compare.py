"""`compare`: results side by side on the trials that all of them have."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm_local.cli.options import count, seed, workers
from vlm_local.cli.output import print_result, tell
from vlm_local.errors import ConfigError, DataError

_KINDS = ("eval", "sim", "spatial", "station", "eval-choices")
_FILMS = 10  # episodes of each task that keep frames, as of `sim`
# Flags of --until-separated. The parser leaves those that are not given None, so that they can be refused without it.
_PLAYING = {
    "env": "ours",
    "task": None,  # the suite's first
    "level": "normal",
    "episodes": 100,
    "seed": 0,
    "max_steps": None,  # the suite's own
    "workers": 1,
}
_EPILOG = (
    "eval: the same steps. sim, station: the same tasks and seeds. spatial: the same scenes. eval-choices: the same "
    "questions. What cannot be compared is refused with the reason."
)


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compare", help="results on the same steps, episodes or scenes, with p-values", epilog=_EPILOG
    )
    parser.description = "Compares results of one kind, paired: scores, differences of all pairs, intervals, p-values."
    add = parser.add_argument
    text = f"two or more --out folders of {', '.join(_KINDS)}; two policies for --until-separated"
    add("results", nargs="+", metavar="RESULT", help=text)
    text = "of the first, second ... result in all tables; may be given again [its folder's]"
    add("--name", action="append", default=[], metavar="A=NAME", help=text)
    add("--out", type=Path, metavar="DIR", help="also Markdown, CSV, LaTeX, and figures as PDF and SVG, for a paper")
    parser.set_defaults(run=_run, goes_on="with --until-separated the same command goes on from here")
    text = "first play two policies (see `sim --policy`) on the same episodes, until one is known to be better"
    play = parser.add_argument_group("playing").add_argument
    play("--until-separated", action="store_true", help=text)
    play("--env", metavar="NAME", help="as of `sim` [ours]")
    play("--task", metavar="T[,T]|all", help="as of `sim`")
    play("--level", metavar="NAME", help="as of `sim` [normal]")
    play("--episodes", type=count(5, 100_000), metavar="N", help="pairs of episodes of each task at most [100]")
    play("--seed", type=seed, metavar="S", help="of the first episode; the next has the next [0]")
    play("--max-steps", type=count(), metavar="N", help="as of `sim`")
    play("--workers", type=workers, metavar="N", help="environments in parallel [1]")


def _run(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name in _PLAYING if getattr(args, name) is not None}
    if args.until_separated:
        _play(args, **(_PLAYING | given))
    elif given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{flags} would change nothing without --until-separated")
    else:
        _compare(args)


def _compare(args: argparse.Namespace) -> None:
    from vlm_local.lab.comparison import LETTERS, compare, format_comparison
    from vlm_local.provenance import describe_machine

    if not 2 <= len(args.results) <= len(LETTERS):
        raise ConfigError(f"compare takes 2 to {len(LETTERS)} results, not {len(args.results)}")
    folders = list(map(Path, args.results))
    names = _read_names(args.name, folders)
    result = compare([_load_trials(folder) for folder in folders], names)
    table = format_comparison(result)
    if args.out is not None:
        from vlm_local.lab.publication import write_publication

        paths = write_publication(args.out, result, describe_machine())
        table += f"\n\n{args.out}: {', '.join(path.name for path in paths)}"
    print_result(args, table, result)


def _load_trials(folder: Path):
    """A result of any study that can be compared."""
    from vlm_local.lab.results import find_layout

    is_station = (folder / "station.jsonl").is_file()  # which cannot be packed and has no layout
    kind = "station" if is_station else find_layout(folder, _KINDS).kind
    if kind == "station":
        from vlm_local.lab.station.trials import load_trials
    elif kind == "eval-choices":
        from vlm_local.lab.multiple_choice.trials import load_trials
    elif kind == "eval":
        from vlm_local.lab.offline.trials import load_trials
    elif kind == "sim":
        from vlm_local.lab.closed_loop.trials import load_trials
    else:
        from vlm_local.lab.spatial.trials import load_trials
    try:
        return load_trials(folder)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: its files are not as `{kind}` wrote them ({error!r})") from error


def _read_names(given: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """By letter where --name says so, else the folders' own names; as they were given, where two are alike."""
    from vlm_local.lab.comparison import LETTERS
    from vlm_local.plain import escape_controls

    short = [escape_controls(folder.resolve().name) for folder in folders]
    names = dict(zip(LETTERS, short if len(set(short)) == len(short) else map(str, folders), strict=False))
    for text in given:
        letter, equals, name = text.partition("=")
        if letter not in names or not equals or not name.strip():
            raise ConfigError(f"--name {text!r}: expected A=NAME, with a letter from A to {max(names)}")
        names[letter] = name.strip()
    if len(set(names.values())) < len(names):
        raise ConfigError(f"two results have the same name: {', '.join(names.values())}; tell them apart with --name")
    return list(names.values())


def _play(args: argparse.Namespace, env, task, level, episodes, seed, max_steps, workers) -> None:
    """--until-separated: play two policies in the simulator and say which is better as soon as it is sure."""
    from contextlib import ExitStack, closing
    from dataclasses import replace

    from vlm_local.environments import find_suite
    from vlm_local.lab.closed_loop.run import RolloutPlan
    from vlm_local.lab.closed_loop.until_separated import ALPHA_EACH, play_until_separated
    from vlm_local.lab.sequential import find_detectable_effect
    from vlm_local.lab.sources import open_source
    from vlm_local.plain import hide_secrets
    from vlm_local.policy_options import PolicyOptions

    if len(args.results) != 2 or args.out is None or args.name:
        raise ConfigError("--until-separated plays two policies into --out DIR, and takes no --name")
    suite = find_suite(env)
    tasks = suite.choose(task or suite.tasks[0])
    names = [hide_secrets(policy) for policy in args.results]
    unchanged = {"noise": 0.0, "control": "none", "films": _FILMS, "gif": False}
    plan = RolloutPlan(names[0], tasks, level, episodes, seed, max_steps or suite.max_steps, **unchanged, env=env)
    plans = [replace(plan, policy=name) for name in names]
    num_pairs = episodes * len(tasks)
    effect = find_detectable_effect(num_pairs, ALPHA_EACH)
    sure = "no difference" if effect is None else f"a difference of {100 * effect:.0f} points or more"
    tell(args, f"{num_pairs} pairs of episodes at most: {sure} of success rates is found in 80 % of cases")
    with ExitStack() as stack:
        options = [PolicyOptions(model=policy) for policy in args.results]
        sources = [stack.enter_context(closing(open_source(each, suite))) for each in options]
        decision = play_until_separated(
            args.out, plans, sources, workers, lambda decision: tell(args, _format_decision(decision))
        )
    if decision["winner"]:
        winner, by, after = (decision[key] for key in ("winner", "by", "after"))
        said = f"{winner} ({names['AB'.index(winner)]}) is better: by {by}, told apart after {after} pairs"
    else:
        said = f"not told apart in {decision['pairs']} pairs; the same command with more --episodes goes on"
    places = f"{args.out / 'decision.json'}; both results: {args.out / 'A'}, {args.out / 'B'}"
    print_result(args, f"{said}\n{places}", decision)


def _format_decision(decision) -> str:
    """A line for each time that both have played."""
    from vlm_local.lab.formats import format_points, format_share, format_span

    parts = [
        f"{name}: A {format_share(told['A'])}, B {format_share(told['B'])}, A - B "
        f"{format_points(told['difference'], 0, '+')} ({format_span(told['interval'], 0, '+')})"
        for name, told in decision["measures"].items()
    ]
    return f"{decision['pairs']:4} pairs  {';  '.join(parts)}"
